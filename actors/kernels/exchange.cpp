// Dispatch and combine of a layer over stream sockets, the front's end: one message to one replica of each group that
// has a token, partial sums added in float32 in the order of groups.
//
// Letters: T tokens, D hidden, K top-k, G groups, E experts; P tokens of a part.

#include "exchange.h"

#include <climits>

#include <poll.h>

#include "products.h"
#include "stream.h"

namespace {

constexpr size_t HEADS = sizeof(Frame) + sizeof(DispatchHead), ANSWER_HEADS = sizeof(Frame) + sizeof(PartialHead);

// What one group gets of a layer's tokens, and what comes back.
struct Parcel {
  std::vector<int32_t> rows;  // its tokens
  std::vector<int16_t> ids;   // [P, K]
  std::vector<char> gates;    // [P, K]
  char heads[HEADS];
  Outgoing out;
  Scratch answer;
  size_t received, expected;

  bool is_answered() const { return received == expected; }
  const char* partial() { return answer.at_least(expected) + ANSWER_HEADS; }
};

struct Tokens {
  int64_t layer, T, D, K, item;  // bytes of a number
  const char* x;
  const int64_t* ids;
  const char* gates;
};

// The group of each choice. An expert with several homes is spread over them by the token's own routing (HomeTable in
// parts.py). False if an expert is unknown.
bool find_groups(const Homes& homes, const Tokens& tokens, int16_t* groups) {
  for (int64_t t = 0; t < tokens.T; ++t) {
    const int64_t* ids = tokens.ids + t * tokens.K;
    int64_t key = 0;
    for (int64_t k = 0; k < tokens.K; ++k) {
      if (ids[k] < 0 || ids[k] >= homes.E) return false;
      key += ids[k];
    }
    for (int64_t k = 0; k < tokens.K; ++k)
      groups[t * tokens.K + k] = homes.home[ids[k] * homes.most + key % homes.numbers[ids[k]]];
  }
  return true;
}

void fill(Parcel& parcel, const Tokens& tokens, const int16_t* groups, int64_t group) {
  const int64_t K = tokens.K, gate_bytes = K * tokens.item;
  parcel.rows.clear(), parcel.ids.clear(), parcel.gates.clear();
  for (int64_t t = 0; t < tokens.T; ++t) {
    const int16_t* here = groups + t * K;
    if (std::find(here, here + K, group) == here + K) continue;
    parcel.rows.push_back(int32_t(t));
    for (int64_t k = 0; k < K; ++k) parcel.ids.push_back(here[k] == group ? int16_t(tokens.ids[t * K + k]) : int16_t(-1));
    const char* gates = tokens.gates + t * gate_bytes;
    parcel.gates.insert(parcel.gates.end(), gates, gates + gate_bytes);
  }
}

void address(Parcel& parcel, const Exchange& exchange, const Tokens& tokens, uint64_t number) {
  const int64_t P = parcel.rows.size(), row_bytes = tokens.D * tokens.item;
  const size_t id_bytes = parcel.ids.size() * sizeof(int16_t);
  const size_t length = sizeof(DispatchHead) + P * row_bytes + parcel.gates.size() + id_bytes;
  const Frame frame = {number, length};
  const DispatchHead head = {DISPATCH_MAGIC, uint16_t(exchange.dtype), uint16_t(exchange.front),
                             uint32_t(exchange.step), uint16_t(tokens.layer), uint16_t(tokens.K), uint32_t(P),
                             uint32_t(tokens.D)};
  std::memcpy(parcel.heads, &frame, sizeof frame);
  std::memcpy(parcel.heads + sizeof frame, &head, sizeof head);
  parcel.out.clear();
  parcel.out.add(parcel.heads, HEADS);
  for (int32_t t : parcel.rows) parcel.out.add(tokens.x + t * row_bytes, row_bytes);
  parcel.out.add(parcel.gates.data(), parcel.gates.size());
  parcel.out.add(parcel.ids.data(), id_bytes);
  parcel.received = 0, parcel.expected = ANSWER_HEADS + P * row_bytes;
}

int64_t least_used(const Exchange& exchange, int64_t group) {
  int64_t best = exchange.first[group];
  for (int64_t r = best + 1; r < exchange.first[group + 1]; ++r)
    if (exchange.replicas[r].num_sent < exchange.replicas[best].num_sent) best = r;
  return best;
}

// The answer to this very message, with partial sums of its tokens.
bool is_ordinary(const Parcel& parcel, const char* answer, const Part& part, const Exchange& exchange, int64_t D) {
  Frame frame;
  PartialHead head;
  std::memcpy(&frame, answer, sizeof frame);
  std::memcpy(&head, answer + sizeof frame, sizeof head);
  return frame.number == uint64_t(part.number) && frame.length == parcel.expected - sizeof frame &&
         head.magic == PARTIAL_MAGIC && head.status == OK && head.dtype == exchange.dtype &&
         head.tokens == parcel.rows.size() && head.hidden == uint64_t(D);
}

class Layers {
 public:
  Layers(Exchange& exchange, const Tokens& tokens, Part* parts)
      : e_(exchange), tokens_(tokens), parts_(parts), parcels_(kept(exchange.G)) {}

  // False if nothing could be sent.
  bool split(const Homes& homes) {
    thread_local Scratch groups_;
    int16_t* groups = groups_.at_least<int16_t>(tokens_.T * tokens_.K);
    if (!find_groups(homes, tokens_, groups)) return false;
    for (int64_t g = 0; g < e_.G; ++g) {
      fill(parcels_[g], tokens_, groups, g);
      parts_[g] = Part();
      parts_[g].state = parcels_[g].rows.empty() ? NO_TOKENS : WAITING, parts_[g].tokens = parcels_[g].rows.size();
      if (parts_[g].tokens && e_.first[g] == e_.first[g + 1]) return false;
    }
    return true;
  }

  void send() {
    for (int64_t g = 0; g < e_.G; ++g) {
      Part& part = parts_[g];
      if (part.state != WAITING) continue;
      part.replica = least_used(e_, g), part.number = e_.next_number++;
      ++e_.replicas[part.replica].num_sent;
      address(parcels_[g], e_, tokens_, part.number);
      part.length = parcels_[g].out.total, part.sent_at = now_ns();
      if (!parcels_[g].out.send(fd(part))) part.state = LOST;
    }
  }

  // Until every answer is there, or something else than that has happened. True if all are ordinary.
  bool wait() {
    for (;;) {
      int64_t until = INT64_MAX;
      std::vector<pollfd>& watched = watched_();
      watched.clear();
      for (int64_t g = 0; g < e_.G; ++g) {
        const Part& part = parts_[g];
        if (part.state == ODD || part.state == LOST) return false;
        if (part.state != WAITING) continue;
        watched.push_back({fd(part), short(parcels_[g].out.is_done() ? POLLIN : POLLIN | POLLOUT), 0});
        until = std::min(until, part.sent_at + patience(g, part.tokens));
      }
      if (watched.empty()) return true;
      const int64_t left = until - now_ns();
      if (poll(watched.data(), watched.size(), int(std::clamp<int64_t>((left + 999'999) / 1'000'000, 0, INT_MAX))) == 0 &&
          left <= 0)
        return false;
      for (size_t i = 0, g = 0; i < watched.size(); ++i, ++g) {
        while (parts_[g].state != WAITING) ++g;
        if (watched[i].revents) look(g);
      }
    }
  }

  // out = the sum of the partial sums, rounded. False if it is not finite.
  template <typename Number, typename Widen, typename Add, typename Narrow>
  bool combine(char* out, Widen widen, Add add, Narrow narrow) {
    const int64_t D = tokens_.D;
    std::vector<size_t>& at = at_();  // the next row of each group's partial sums
    at.assign(e_.G, 0);
    int64_t lead = 0;
    while (parts_[lead].state == NO_TOKENS) ++lead;
    const bool leads = parts_[lead].tokens == tokens_.T;
    bool is_finite = true;
    float* sum = row_of(D);
    for (int64_t t = 0; t < tokens_.T; ++t) {
      if (!leads) std::fill_n(sum, D, 0.0f);
      for (int64_t g = lead; g < e_.G; ++g) {
        const std::vector<int32_t>& rows = parcels_[g].rows;
        if (at[g] == rows.size() || rows[at[g]] != t) continue;
        const char* row = parcels_[g].partial() + at[g]++ * D * sizeof(Number);
        if (leads && g == lead) widen(row, D, sum);
        else add(row, D, sum);
      }
      is_finite &= all_finite(sum, D);
      narrow(sum, D, out + t * D * sizeof(Number));
    }
    return is_finite;
  }

  void report() {
    for (int64_t g = 0; g < e_.G; ++g) {
      Part& part = parts_[g];
      if (part.state == NO_TOKENS) continue;
      part.sent = parcels_[g].out.sent, part.received = parcels_[g].received;
      part.answer = parcels_[g].answer.at_least(parcels_[g].expected);
    }
  }

 private:
  // Kept by the thread: their memory grows once.
  static std::vector<Parcel>& kept(int64_t G) {
    thread_local std::vector<Parcel> parcels;
    if (int64_t(parcels.size()) < G) parcels = std::vector<Parcel>(G);
    return parcels;
  }
  static std::vector<pollfd>& watched_() {
    thread_local std::vector<pollfd> watched;
    return watched;
  }
  static std::vector<size_t>& at_() {
    thread_local std::vector<size_t> at;
    return at;
  }

  int fd(const Part& part) const { return int(e_.replicas[part.replica].fd); }

  int64_t patience(int64_t group, int64_t tokens) const {
    int64_t bits = 0;
    while (tokens >> bits) ++bits;
    return e_.patience[group * PATIENCE + std::min(bits, PATIENCE - 1)];
  }

  // Something has come, there is room for more, or the connection is lost.
  void look(int64_t group) {
    Parcel& parcel = parcels_[group];
    Part& part = parts_[group];
    char* answer = parcel.answer.at_least(parcel.expected);
    if (!parcel.out.send(fd(part)) || !receive_some(fd(part), answer, parcel.received, parcel.expected)) {
      part.state = LOST;
      return;
    }
    if (parcel.received < ANSWER_HEADS) return;
    if (!parcel.out.is_done() || !is_ordinary(parcel, answer, part, e_, tokens_.D)) {
      part.state = ODD;
    } else if (parcel.is_answered()) {
      PartialHead head;
      std::memcpy(&head, answer + sizeof(Frame), sizeof head);
      part.state = ANSWERED, part.answered_at = now_ns(), part.compute_ns = int64_t(head.nanoseconds);
    }
  }

  AVX2 static bool all_finite(const float* row, int64_t n) {
    uint32_t largest = 0;
    for (int64_t i = 0; i < n; ++i) {
      uint32_t bits;
      std::memcpy(&bits, row + i, 4);
      bits &= 0x7fffffff;
      largest = bits > largest ? bits : largest;
    }
    return largest < 0x7f800000;
  }

  Exchange& e_;
  const Tokens& tokens_;
  Part* parts_;
  std::vector<Parcel>& parcels_;
};

bool combine(Layers& layers, int64_t dtype, char* out) {
  if (dtype == BFLOAT16_CODE)
    return layers.combine<bf16>(
        out, [](const char* row, long n, float* sum) { widen_row(reinterpret_cast<const bf16*>(row), n, sum); },
        [](const char* row, long n, float* sum) { add_narrow(reinterpret_cast<const bf16*>(row), n, sum); },
        [](const float* sum, long n, char* to) { narrow_row(sum, n, reinterpret_cast<bf16*>(to)); });
  return layers.combine<float>(
      out, [](const char* row, long n, float* sum) { std::memcpy(sum, row, n * sizeof(float)); },
      [](const char* row, long n, float* sum) { add_row(reinterpret_cast<const float*>(row), n, sum); },
      [](const float* sum, long n, char* to) { std::memcpy(to, sum, n * sizeof(float)); });
}

}  // namespace

EXPORT int outcrop_exchange(Exchange* exchange, const Homes* homes, int64_t layer, int64_t T, int64_t D, int64_t K,
                            const char* x, const int64_t* ids, const char* gates, char* out, Part* parts) {
  const int64_t item = exchange->dtype == BFLOAT16_CODE ? sizeof(bf16) : sizeof(float);
  const Tokens tokens = {layer, T, D, K, item, x, ids, gates};
  Layers layers(*exchange, tokens, parts);
  if (!layers.split(*homes)) return 2;
  layers.send();
  const bool is_done = layers.wait() && combine(layers, exchange->dtype, out);
  layers.report();
  return is_done ? 0 : 1;
}
