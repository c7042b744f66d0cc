"""Structured output in the engine: every finished answer fits its schema, whatever else happens to its sequence."""

import asyncio
import json
import re
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from actors.engine.constraint import Constraint
from actors.engine.engine import Engine
from cluster.messages.requests import GenerationRequest, RequestOutput, SamplingParams
from cluster.models.grammars import GrammarError, Grammars
from deploy.demo import MODEL_DIR
from deploy.ingress.text.grammar import GrammarWriter, Thought
from deploy.ingress.text.tokens import Tokenizer
from deploy.ingress.text.tool_calls import FORMATS, ToolCallParser, ToolFormat, join_calls
from tests.checkpoints import MODELS, write_checkpoint
from tests.engines import make_engine
from tests.schemas import Schema, all_schemas, closed
from tests.unit.fake_supervisor import COMPLETIONS, Open

END = 0
JSON_BODY = {"Content-Type": "application/json"}
PROMPT = tuple(range(5, 30))
SCHEMA = closed({"name": {"type": "string", "pattern": "^[a-z]{12,16}$"}, "count": {"type": "integer", "maximum": 99}})
TEXT_KINDS = {"regex": "[a-f]{3}-[0-9]+!", "choice": ["one", "two", "twenty"], "grammar": 'root ::= "a" root | "b"'}


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(MODELS["granite"], tmp_path_factory.mktemp("granite"))


@pytest.fixture(scope="module")
def grammars(model_dir: Path) -> Grammars:
    return Grammars(model_dir)


class Answers:
    """What became of constrained requests, by name."""

    def __init__(self, model_dir: Path, engine: Engine, grammars: Grammars) -> None:
        self.engine, self.grammars = engine, grammars
        self.tokenizer = Tokenizer.load(model_dir)
        # Without white space an untrained model comes to an end.
        blanks = [self.tokenizer.encode(text)[0] for text in " \n\r\t"]
        self.params = SamplingParams(
            max_tokens=100, stop_token_ids=(END,), logit_bias=tuple((blank, -100.0) for blank in blanks)
        )
        self.tokens: dict[str, list[int]] = {}
        self.reasons: dict[str, str | None] = {}

    def ask(self, name: str, kind: str | None = None, value: Any = None, **params: Any) -> GenerationRequest:
        grammar = None if kind is None else GrammarWriter(self.grammars.added).write(kind, value)
        request = GenerationRequest(name, "t", PROMPT, replace(self.params, grammar=grammar, **params))
        return self.offer(request)

    def offer(self, request: GenerationRequest) -> GenerationRequest:
        grammar, vocab_size = request.params.grammar, self.engine.model.spec.vocab_size
        constraint = None if grammar is None else Constraint(self.grammars.compile(grammar), vocab_size)
        self.engine.add(request, constraint)
        self.tokens[request.request_id] = list(request.output_token_ids)
        return request

    def step(self) -> list[RequestOutput]:
        outputs = self.engine.step()
        for output in outputs:
            self.tokens[output.request_id] += output.token_ids
            self.reasons[output.request_id] = output.finish_reason
        self.engine.check_integrity()
        return outputs

    def run(self) -> None:
        while self.engine.has_work:
            self.step()

    def text(self, name: str) -> str:
        return self.tokenizer.decode(self.tokens[name])


@pytest.fixture
def answers(model_dir: Path, grammars: Grammars) -> Answers:
    return Answers(model_dir, make_engine(model_dir), grammars)


def check_schemas(model_dir: Path, schemas: list[Schema], temperature: float, least: float) -> None:
    engine = make_engine(model_dir, num_blocks=1024, block_size=16, budget=None, max_num_seqs=48)
    answers = Answers(model_dir, engine, Grammars(model_dir))
    for n, schema in enumerate(schemas):
        answers.ask(str(n), "json", schema, temperature=temperature, seed=n)
    answers.run()
    finished = [n for n in range(len(schemas)) if answers.reasons[str(n)] == "stop"]
    assert {answers.reasons[str(n)] for n in set(range(len(schemas))) - {*finished}} <= {"length"}
    for n in finished:
        text, kind = answers.text(str(n)), jsonschema.Draft202012Validator
        errors = list(kind(schemas[n], format_checker=kind.FORMAT_CHECKER).iter_errors(json.loads(text)))
        assert not errors, f"{schemas[n]} has got {text}: {errors[0].message}"
    assert len(finished) >= least * len(schemas), "the test is meant to see finished answers"


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_finished_answers_fit_300_schemas(model_dir: Path, temperature: float) -> None:
    schemas = all_schemas()
    assert len(schemas) >= 300
    check_schemas(model_dir, schemas, temperature, least=0.9)


@pytest.mark.long
@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_those_of_the_demo_model_too(temperature: float) -> None:
    check_schemas(MODEL_DIR, all_schemas(), temperature, least=0.9)


class TestTheStateIsThatOfTheTokens:
    """A schedule, a preemption, a replay or a cached prefix changes nothing."""

    @staticmethod
    def requests(answers: Answers) -> None:
        for n in range(6):
            answers.ask(f"json {n}", "json", SCHEMA, seed=n)
            answers.ask(f"free {n}", seed=n, max_tokens=40)
        for kind, value in TEXT_KINDS.items():
            answers.ask(kind, kind, value, seed=7)
        answers.ask("biased", "json", SCHEMA, frequency_penalty=1.5, repetition_penalty=1.2, top_p=0.9, top_k=9)

    @pytest.fixture(scope="class")
    def undisturbed(self, model_dir: Path, grammars: Grammars) -> dict[str, list[int]]:
        answers = Answers(model_dir, make_engine(model_dir, num_blocks=400, prefix_caching=False), grammars)
        self.requests(answers)
        answers.run()
        assert all(json.loads(answers.text(name)) for name in ("json 0", "biased"))
        assert answers.text("choice") in TEXT_KINDS["choice"]
        return answers.tokens

    @pytest.mark.parametrize("options", [{"num_blocks": 40}, {"budget": 9, "num_blocks": 200, "max_num_seqs": 3}])
    def test_schedules_and_preemptions(
        self,
        model_dir: Path,
        grammars: Grammars,
        undisturbed: dict[str, list[int]],
        options: dict[str, Any],
    ) -> None:
        answers = Answers(model_dir, make_engine(model_dir, **options), grammars)
        self.requests(answers)
        answers.run()
        assert answers.tokens == undisturbed
        assert answers.engine.scheduler.num_preemptions > 0 or options["num_blocks"] == 200

    @pytest.mark.parametrize("num_steps", [1, 2, 9, 25])
    def test_another_front_goes_on(self, model_dir: Path, grammars: Grammars, num_steps: int) -> None:
        whole = Answers(model_dir, make_engine(model_dir), grammars)
        request = whole.ask("a", "json", SCHEMA, seed=3)
        whole.run()
        lost = Answers(model_dir, make_engine(model_dir), grammars)
        lost.ask("a", "json", SCHEMA, seed=3)
        for _ in range(num_steps):
            lost.step()
        other = Answers(model_dir, make_engine(model_dir), grammars)
        other.offer(replace(request, output_token_ids=tuple(lost.tokens["a"]), attempt=1))
        other.run()
        assert 0 < len(lost.tokens["a"]) < len(whole.tokens["a"])
        assert other.tokens["a"] == whole.tokens["a"]

    def test_free_answers_are_those_without_constrained_ones_beside_them(
        self, model_dir: Path, grammars: Grammars, undisturbed: dict[str, list[int]]
    ) -> None:
        answers = Answers(model_dir, make_engine(model_dir, num_blocks=400), grammars)
        for n in range(6):
            answers.ask(f"free {n}", seed=n, max_tokens=40)
        answers.run()
        assert answers.tokens == {name: undisturbed[name] for name in answers.tokens}


THOUGHTS: list[tuple[Thought, str]] = [("begun", "Hm.</think>\n"), ("maybe", "<think>Hm.</think>\n"), ("maybe", "")]


@pytest.mark.parametrize(("kind", "value"), [("json", SCHEMA), *TEXT_KINDS.items()], ids=["json", *TEXT_KINDS])
@pytest.mark.parametrize(("thought", "said"), THOUGHTS)
def test_a_thought_comes_before_what_the_grammar_asks_for(
    answers: Answers, kind: str, value: Any, thought: Thought, said: str
) -> None:
    grammar = GrammarWriter(answers.grammars.added).write(kind, value, thought)
    tokens = tuple(answers.tokenizer.encode(said)) if said else ()
    params = replace(answers.params, grammar=grammar, max_tokens=len(tokens) + 100)
    # A bias against the mark: with it, an untrained model could think for ever.
    params = replace(params, logit_bias=(*params.logit_bias, (answers.tokenizer.encode("<")[0], -100.0)))
    answers.offer(GenerationRequest("a", "t", PROMPT, params, output_token_ids=tokens))
    answers.run()
    text = answers.text("a").removeprefix(said)
    assert answers.reasons["a"] == "stop"
    assert kind != "json" or jsonschema.Draft202012Validator(SCHEMA).is_valid(json.loads(text))
    assert kind != "regex" or re.fullmatch(value, text)
    assert kind != "choice" or text in value
    assert kind != "grammar" or re.fullmatch("a*b", text)


TOOLS = [
    {"name": "get_replicas", "schema": closed({"group": {"enum": [0, 1]}})},
    # References begin at the schema of the function, wherever that stands.
    {"name": "scale", "schema": closed({"to": {"$ref": "#/$defs/n"}}, **{"$defs": {"n": {"enum": [1, 2]}}})},
]


def fits(name: str | None, arguments: Any) -> bool:
    return arguments in ({"group": 0}, {"group": 1}) if name == "get_replicas" else arguments in ({"to": 1}, {"to": 2})


@pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS)
class TestTools:
    def asked(self, form: ToolFormat, **options: Any) -> dict[str, Any]:
        marks = {"begin": form.begin, "end": form.end, "is_list": form.is_list, "tools": TOOLS}
        return marks | {"may_talk": False, "most": None, "content": None} | options

    def calls(self, form: ToolFormat, text: str) -> list[tuple[str | None, Any]]:
        parser = ToolCallParser(form)
        content, calls = parser.feed(text)
        assert (content + parser.flush()).replace("Hm.", "") == ""
        return [(call.name, json.loads(call.arguments)) for call in join_calls(calls)]

    def test_calls_that_are_required(self, answers: Answers, form: ToolFormat) -> None:
        for n in range(8):
            asked = self.asked(form, most=[None, 1][n % 2])
            answers.ask(str(n), "tools", asked, seed=n, max_tokens=250, temperature=1.5)
        answers.run()
        found = {n: self.calls(form, answers.text(str(n))) for n in range(8) if answers.reasons[str(n)] == "stop"}
        assert len(found) > 4
        assert all(calls and all(fits(*call) for call in calls) for calls in found.values())
        assert all(len(calls) == 1 for n, calls in found.items() if n % 2)

    @pytest.mark.parametrize("begun", ["", '{"name": "sc', '{"name": "get_replicas", "arguments": {"gro'])
    def test_a_call_that_has_begun_keeps_to_its_schema(self, answers: Answers, form: ToolFormat, begun: str) -> None:
        grammar = GrammarWriter(answers.grammars.added).write("tools", self.asked(form, may_talk=True, most=1))
        said = answers.tokenizer.encode(f"Hm.{form.begin}{'[' if form.is_list else ''}{begun}")
        params = replace(answers.params, grammar=grammar, max_tokens=len(said) + 120)
        answers.offer(GenerationRequest("a", "t", PROMPT, params, output_token_ids=tuple(said)))
        answers.run()
        assert answers.reasons["a"] == "stop"
        [call] = self.calls(form, answers.text("a"))
        assert fits(*call)

    def test_an_answer_of_a_schema_in_place_of_a_call(self, answers: Answers, form: ToolFormat) -> None:
        asked = self.asked(form, content=closed({"z": {"const": 1}}))
        for n in range(12):
            answers.ask(str(n), "tools", asked, seed=n, max_tokens=250)
        answers.run()
        texts = [answers.text(name) for name, reason in answers.reasons.items() if reason == "stop"]
        assert texts
        assert all(text == '{"z":1}' or all(fits(*call) for call in self.calls(form, text)) for text in texts)


class TestOneSequence:
    def test_too_few_tokens_end_with_length(self, answers: Answers) -> None:
        answers.ask("a", "json", SCHEMA, max_tokens=5)
        answers.run()
        assert answers.reasons["a"] == "length"
        assert answers.text("a").startswith('{"na')

    def test_log_probabilities_are_the_models(self, answers: Answers) -> None:
        answers.ask("a", "choice", ["zz"], logprobs=3)
        first = answers.step()[0].logprobs[0]
        assert first.token_id == answers.tokenizer.encode("z")[0]
        assert first.rank > 1, "the model itself would have said something else"

    def test_one_that_goes_beyond_its_limits_fails_alone(self, answers: Answers) -> None:
        answers.ask("wild", "regex", "(.*a.{400}b)", temperature=1.5, max_tokens=200, logit_bias=((END, -100.0),))
        answers.ask("free", max_tokens=60, stop_token_ids=())
        constraint = answers.engine.sequences["wild"].constraint
        assert constraint is not None
        real, calls = constraint.follow, iter(range(20))

        def until_it_breaks(emitted: Iterable[int]) -> None:
            if next(calls, None) is None:
                raise GrammarError("too many states")
            real(list(emitted))

        constraint.follow = until_it_breaks  # type: ignore[method-assign,assignment]
        outputs = [output for _ in range(100) for output in answers.step()]
        [failed] = [output for output in outputs if output.error]
        assert (failed.request_id, failed.error, failed.is_refusal) == ("wild", "too many states", True)
        assert (answers.reasons["wild"], len(answers.tokens["wild"])) == ("error", 20)
        assert (answers.reasons["free"], len(answers.tokens["free"])) == ("length", 60)


class TestGrammarsAreCompiledOnce:
    def compiled(self, monkeypatch: pytest.MonkeyPatch, model_dir: Path, texts: list[str]) -> list[str]:
        """Those that were really compiled."""
        grammars, done = Grammars(model_dir), list[str]()
        real = grammars._compiled
        monkeypatch.setattr(grammars, "_compiled", lambda grammar: (done.append(grammar), real(grammar))[1])
        for text in texts:
            grammars.compile(text)
        return done

    def test_while_they_are_kept(self, monkeypatch: pytest.MonkeyPatch, model_dir: Path) -> None:
        monkeypatch.setattr("cluster.models.grammars.MAX_KEPT", 2)
        a, b, c = (f'start: "{letter}"\n' for letter in "abc")
        assert self.compiled(monkeypatch, model_dir, [a, a, b, a, c, a, b]) == [a, b, c, b]

    def test_and_no_more_than_so_much_text_is_kept(self, monkeypatch: pytest.MonkeyPatch, model_dir: Path) -> None:
        monkeypatch.setattr("cluster.models.grammars.MAX_KEPT_CHARS", 40)
        a, long = 'start: "a"\n', f'start: "{"b" * 25}"\n'
        assert self.compiled(monkeypatch, model_dir, [a, long, long, a]) == [a, long, a]

    def test_what_one_sequence_has_said_no_other_one_has(self, grammars: Grammars) -> None:
        grammar = 'start: "a" "b"\n'
        one, other = grammars.compile(grammar), grammars.compile(grammar)
        fresh = other.compute_bitmask()
        assert one.consume_token(next(token for token in range(2000) if fresh[token // 8] >> token % 8 & 1))
        assert one.compute_bitmask() != fresh
        assert other.compute_bitmask() == grammars.compile(grammar).compute_bitmask() == fresh


SCHEMAS: dict[str, Any] = {
    "uniqueItems": {"type": "array", "uniqueItems": True},
    "not": {"not": {"type": "string"}},
    "propertyNames": {"type": "object", "propertyNames": {"pattern": "a"}},
    "minItems": {"type": "array", "minItems": "three"},
    "Unknown format": {"type": "string", "format": "bogus"},
    "http://a/b": {"$ref": "http://a/b"},
    "no text satisfies it": {"$ref": "#"},
    "wat": {"type": "wat"},
    "nests more than": json.loads('{"items":' * 400 + "{}" + "}" * 400),
}
FORMATS: list[tuple[dict[str, Any], str]] = [
    *(({"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": s}}}, told)
      for told, s in SCHEMAS.items()),
    ({"structured_outputs": {"regex": "(a"}}, "unclosed group"),
    ({"structured_outputs": {"regex": ""}}, "1 to"),
    ({"structured_outputs": {"grammar": "start: nothing"}}, "nothing"),
    ({"structured_outputs": {"choice": []}}, "choice"),
    ({"structured_outputs": {"choice": ["a"], "regex": "a"}}, "exactly one"),
    ({"structured_outputs": {"json": "{"}}, "not valid JSON"),
    ({"structured_outputs": {"whitespace_pattern": " "}}, "'whitespace_pattern', which is not supported"),
    ({"structured_outputs": {"structural_tag": {"format": {}}}}, "structures"),
    ({"structured_outputs": {"structural_tag": {"triggers": ["<a"], "structures": [{"begin": "<b>", "schema": {},
      "end": ""}]}}}, "none of the triggers"),
    ({"response_format": {"type": "xml"}}, "json_object"),
    ({"response_format": {"type": "json_schema", "json_schema": {"name": "a"}}}, "schema"),
    ({"response_format": {"type": "json_object"}, "structured_outputs": {"regex": "a"}}, "together"),
    ({"response_format": {"type": "json_object"}, "ignore_eos": True}, "ignore_eos"),
    ({"response_format": {"type": "json_object"}, "min_tokens": 3}, "min_tokens"),
]  # fmt: skip


async def test_what_is_not_supported_is_named(open_api: Open) -> None:
    http = await open_api()
    for body, told in FORMATS:
        answer = await http.post(COMPLETIONS, json={"prompt": "Hi"} | body)
        error = answer.json()["error"]
        assert (answer.status_code, error["param"] in body) == (400, True), told
        assert told in error["message"]


HOSTILE: dict[str, Any] = {
    "2 MB": {"json": {"type": "object", "properties": {f"p_{n}": {"pattern": f"^a{n}.*b" * 8} for n in range(20_000)}}},
    "4000 properties": {"json": {"type": "object", "properties": {f"p{n}": {"type": "string"} for n in range(2500)}}},
    "multipleOf": {"json": {"type": "integer", "multipleOf": 999_983}},
    "100,000 choices": {"choice": [f"choice number {n}" for n in range(100_000)]},
    "5000 choices": {"choice": [f"number {n}" for n in range(5000)]},
    "repetitions": {"regex": "((((a{0,100}){0,100}){0,100}){0,100})b"},
    "backtracking": {"regex": "(a|a|a|a|a|a)*(a+)+$"},
    "ambiguous": {"grammar": 'start: a\na: a a a a | /[a-z ]*/ | "x" | ""'},
}  # fmt: skip


async def test_hostile_grammars_hold_up_nobody(open_api: Open) -> None:
    """Each is answered: refused, or found good, after which a front is missing. The event loop turns all the time."""
    http = await open_api(max_body_mib=16)
    gaps: list[float] = []

    async def turn() -> None:
        loop = asyncio.get_running_loop()
        while True:
            before = loop.time()
            await asyncio.sleep(0.01)
            gaps.append(loop.time() - before)

    turning = asyncio.create_task(turn())
    statuses = {}
    for name, asked in HOSTILE.items():
        content = json.dumps({"prompt": "Hi", "structured_outputs": asked})
        answer = await asyncio.wait_for(http.post(COMPLETIONS, content=content, headers=JSON_BODY), 10)
        statuses[name] = answer.status_code
    deep = b'{"prompt": "Hi", "structured_outputs": {"json": ' + b'{"items":' * 10_000 + b"{}" + b"}" * 10_002
    statuses["deep"] = (await http.post(COMPLETIONS, content=deep, headers=JSON_BODY)).status_code
    turning.cancel()
    refused = {name for name, status in statuses.items() if status == 400}
    assert {status for name, status in statuses.items() if name not in refused} == {503}
    assert refused >= {"2 MB", "4000 properties", "multipleOf", "100,000 choices", "deep"}
    assert max(gaps) < 0.3
