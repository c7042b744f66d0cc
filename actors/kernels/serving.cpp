// A replica's end of stream sockets: reads dispatches, checks them, computes all experts of their layer, answers. It
// reads a frame of each front at a time, and none of a front that has not taken its last answer.
//
// Letters: T tokens, D hidden, K top-k, E experts held of a layer.

#include "exchange.h"

#include <atomic>
#include <map>
#include <new>

#include <poll.h>
#include <unistd.h>

#include "stream.h"

namespace {

constexpr size_t HEADS = sizeof(Frame) + sizeof(DispatchHead), ANSWER_HEADS = sizeof(Frame) + sizeof(PartialHead);
constexpr size_t FIRST_READ = 1 << 14;
constexpr size_t MOST_TOGETHER = 8192;  // tokens: beyond, nothing is gained, and memory grows with the fronts

// Bytes that have come from a front. They begin so that a dispatch's numbers are aligned.
class Inbox {
 public:
  char* data() const { return memory_.get() + LEAD; }
  size_t size() const { return size_; }

  // Reads until a frame is whole or nothing more has come. False if the front is gone, or sends what can't be ours.
  bool read(int fd, bool& is_garbage) {
    reserve(FIRST_READ);
    while (!has_frame()) {
      if (is_odd()) return is_garbage = true, false;
      if (size_ >= sizeof(Frame)) reserve(sizeof(Frame) + length());
      if (!receive_some(fd, data(), size_, capacity_)) return false;
      if (size_ < capacity_) return true;  // all that has come
    }
    return true;
  }

  bool has_frame() const { return size_ >= sizeof(Frame) && length() <= MAX_MESSAGE && size_ >= sizeof(Frame) + length(); }
  bool is_odd() const { return size_ >= sizeof(Frame) && length() > MAX_MESSAGE; }

  Frame frame() const {
    Frame frame;
    std::memcpy(&frame, data(), sizeof frame);
    return frame;
  }

  // The first frame is not wanted any more.
  void drop_frame() {
    const size_t end = sizeof(Frame) + length();
    std::memmove(data(), data() + end, size_ - end);
    size_ -= end;
  }

 private:
  static constexpr size_t LEAD = 64 - HEADS % 64;
  struct Free {
    void operator()(char* p) const { ::operator delete[](p, std::align_val_t(64)); }
  };

  uint64_t length() const { return frame().length; }

  void reserve(size_t bytes) {
    if (bytes <= capacity_) return;
    std::unique_ptr<char, Free> larger(new (std::align_val_t(64)) char[LEAD + bytes]);
    if (size_) std::memcpy(larger.get() + LEAD, data(), size_);
    memory_ = std::move(larger), capacity_ = bytes;
  }

  std::unique_ptr<char, Free> memory_;
  size_t size_ = 0, capacity_ = 0;
};

struct Peer {
  Inbox in;
  std::vector<char> unsent;
  size_t flushed = 0;  // bytes of `unsent` that have left meanwhile
  bool is_gone = false;
};

// A dispatch that is ordinary so far: its sizes are the model's.
struct Waiting {
  int fd;
  uint64_t number;
  DispatchHead head;
  const char* x;
};

struct HeldLayer {
  const char* packed = nullptr;
  long E = 0;
  std::vector<int64_t> rows;  // [num_experts], -1: not held
};

}  // namespace

struct Serving {
 public:
  Serving(int is_int8, int isa, long L, long num_experts, long D, long F, long K, const double* bounds,
          long num_bounds)
      : is_int8_(is_int8), isa_(isa), D_(D), F_(F), K_(K), num_experts_(num_experts), layers_(L),
        bounds_(bounds, bounds + num_bounds) {}

  void close_peers() {
    for (auto& [fd, peer] : peers_) close(fd);
    peers_.clear();
  }

  void set_layer(long layer, const char* packed, long E, const int64_t* rows) {
    std::lock_guard<std::mutex> guard(computing_);
    layers_[layer] = {packed, E, std::vector<int64_t>(rows, rows + num_experts_)};
  }

  void listen(int listener) { listener_ = listener; }
  void add(int fd) { peers_[fd]; }
  void stop() { is_stopped_ = true; }
  long num_peers() const { return peers_.size(); }

  int run(long threads, long milliseconds, Arrival& arrival) {
    if (held_ >= 0) release();
    while (!is_stopped_) {
      const int event = turn(threads, milliseconds, arrival);
      if (event >= 0) return event;
    }
    return NOTHING;
  }

  void answer(int64_t fd, uint64_t number, const char* message, size_t length) {
    const auto found = peers_.find(int(fd));
    if (found == peers_.end()) return;
    const Frame frame = {number, length};
    Outgoing out;
    out.add(&frame, sizeof frame);
    out.add(message, length);
    send(found->first, found->second, out);
  }

  ServingCounts counts = {};

 private:
  // One look at everybody. An event, or -1: all that has come is done.
  int turn(long threads, long milliseconds, Arrival& arrival) {
    watched_.assign(1, {listener_, POLLIN, 0});
    bool has_more = false;
    for (auto& [fd, peer] : peers_) {
      watched_.push_back({fd, short(peer.unsent.empty() ? POLLIN : POLLOUT), 0});
      has_more |= peer.unsent.empty() && (peer.in.has_frame() || peer.in.is_odd());
    }
    if (poll(watched_.data(), watched_.size(), has_more ? 0 : int(milliseconds)) == 0 && !has_more) return NOTHING;
    std::map<long, std::vector<Waiting>> by_layer;
    int odd = -1;
    size_t i = 1;
    for (auto& [fd, peer] : peers_)
      if (!look(fd, peer, watched_[i++].revents != 0, by_layer)) odd = next_odd(odd, fd);
    for (auto& [layer, waiting] : by_layer)
      for (size_t first = 0; first < waiting.size();) first = compute(threads, layer, waiting, first, odd);
    for (auto peer = peers_.begin(); peer != peers_.end();)
      if (peer->second.is_gone) close(peer->first), peer = peers_.erase(peer);
      else ++peer;
    if (odd >= 0 && peers_.count(odd)) return hold(odd, arrival);
    return watched_[0].revents ? KNOCKED : -1;
  }

  // Of two peers with a frame for Python, the one whose turn it is: they follow each other.
  int next_odd(int one, int other) const {
    if (one < 0 || (one > last_odd_) != (other > last_odd_)) return one > last_odd_ ? one : other;
    return std::min(one, other);
  }

  // Reads, and takes a frame that is ordinary. False if there is one that is not: it stays.
  bool look(int fd, Peer& peer, bool is_ready, std::map<long, std::vector<Waiting>>& by_layer) {
    if (is_ready) {
      bool is_garbage = false;
      if (!flush(fd, peer) || !(peer.in.has_frame() || read(fd, peer, is_garbage))) {
        peer.is_gone = true, counts.dropped += is_garbage;
        return true;
      }
    } else if (peer.in.is_odd()) {
      peer.is_gone = true, ++counts.dropped;
      return true;
    }
    if (!peer.unsent.empty() || !peer.in.has_frame()) return true;
    const Frame frame = peer.in.frame();
    Waiting waiting = {fd, frame.number, {}, peer.in.data() + HEADS};
    if (frame.length < sizeof(DispatchHead)) return false;
    std::memcpy(&waiting.head, peer.in.data() + sizeof frame, sizeof waiting.head);
    if (!is_ordinary(waiting.head, frame.length)) return false;
    by_layer[waiting.head.layer].push_back(waiting);
    return true;
  }

  static bool read(int fd, Peer& peer, bool& is_garbage) try {
    return peer.in.read(fd, is_garbage);
  } catch (const std::bad_alloc&) {  // it asks for more than there is
    return false;
  }

  bool is_ordinary(const DispatchHead& head, uint64_t length) const {
    if (head.magic != DISPATCH_MAGIC || head.dtype != BFLOAT16_CODE || head.layer >= layers_.size() || head.tokens == 0 ||
        head.tokens > MAX_TOKENS || head.hidden != D_ || head.top_k != K_)
      return false;
    const uint64_t row = D_ * sizeof(bf16) + K_ * (sizeof(bf16) + sizeof(int16_t));
    return length == sizeof head + head.tokens * row;
  }

  // Messages of one layer from `first` on, computed together as far as MOST_TOGETHER allows. One that asks for an expert
  // that is not here stays, and may become `odd`. Returns the first that has not been looked at.
  size_t compute(long threads, long layer, std::vector<Waiting>& waiting, size_t first, int& odd) {
    std::lock_guard<std::mutex> guard(computing_);
    const HeldLayer& held = layers_[layer];
    rows_.clear();
    std::vector<Waiting> here;
    for (; first < waiting.size(); ++first) {
      const Waiting& message = waiting[first];
      if (!here.empty() && rows_.size() / K_ + message.head.tokens > MOST_TOGETHER) break;
      if (add_rows(message, held)) here.push_back(message);
      else odd = next_odd(odd, message.fd);
    }
    if (here.empty()) return first;
    const int64_t T = rows_.size() / K_, began = now_ns();
    __atomic_store_n(&counts.began_at, began, __ATOMIC_RELAXED);
    bf16* y = y_.at_least<bf16>(T * D_);
    const bf16 *x = reinterpret_cast<const bf16*>(here[0].x), *gates = x + here[0].head.tokens * D_;
    if (here.size() > 1) gather(here, T, x, gates);
    outcrop_experts(is_int8_, isa_, threads, x, T, D_, F_, rows_.data(), gates, K_, held.E, held.packed, y);
    const int64_t took = now_ns() - began;
    __atomic_store_n(&counts.began_at, 0, __ATOMIC_RELAXED);
    count(T, took);
    for (const Waiting& message : here) {
      answer(message, y, took);
      y += message.head.tokens * D_;
    }
    return first;
  }

  // The rows of the experts that a message asks for. False, and nothing is added, if one is not held.
  bool add_rows(const Waiting& message, const HeldLayer& held) {
    const size_t before = rows_.size(), number = size_t(message.head.tokens) * K_;
    const char* ids = message.x + message.head.tokens * (D_ + K_) * sizeof(bf16);
    for (size_t i = 0; i < number; ++i) {
      int16_t id;
      std::memcpy(&id, ids + i * sizeof id, sizeof id);
      const int64_t row = id < 0 ? held.E : id < num_experts_ ? held.rows[id] : -1;
      if (row < 0) return rows_.resize(before), false;
      rows_.push_back(row);
    }
    return true;
  }

  void gather(const std::vector<Waiting>& messages, int64_t T, const bf16*& x, const bf16*& gates) {
    bf16 *to_x = x_.at_least<bf16>(T * D_), *to_gates = gates_.at_least<bf16>(T * K_);
    x = to_x, gates = to_gates;
    for (const Waiting& message : messages) {
      const bf16* from = reinterpret_cast<const bf16*>(message.x);
      const long tokens = message.head.tokens;
      to_x = std::copy_n(from, tokens * D_, to_x);
      to_gates = std::copy_n(from + tokens * D_, tokens * K_, to_gates);
    }
  }

  void count(int64_t tokens, int64_t nanoseconds) {
    counts.tokens += tokens, ++counts.messages, counts.nanoseconds += nanoseconds;
    ++counts.at_most[std::lower_bound(bounds_.begin(), bounds_.end(), nanoseconds * 1e-9) - bounds_.begin()];
  }

  void answer(const Waiting& message, const bf16* y, int64_t nanoseconds) {
    Peer& peer = peers_[message.fd];
    const uint32_t T = message.head.tokens;
    const size_t bytes = size_t(T) * D_ * sizeof(bf16);
    const Frame frame = {message.number, sizeof(PartialHead) + bytes};
    const PartialHead head = {PARTIAL_MAGIC, BFLOAT16_CODE, OK, T, uint32_t(D_), 0, uint64_t(nanoseconds)};
    Outgoing out;
    out.add(&frame, sizeof frame);
    out.add(&head, sizeof head);
    out.add(y, bytes);
    peer.in.drop_frame();
    send(message.fd, peer, out);
  }

  void send(int fd, Peer& peer, Outgoing& out) {
    if (peer.unsent.empty() && !out.send(fd)) peer.is_gone = true;
    out.copy_rest(peer.unsent);
  }

  bool flush(int fd, Peer& peer) {
    if (peer.unsent.empty()) return true;
    Outgoing out;
    out.add(peer.unsent.data() + peer.flushed, peer.unsent.size() - peer.flushed);
    const bool is_there = out.send(fd);
    peer.flushed += out.sent;
    if (out.is_done()) peer.unsent.clear(), peer.flushed = 0;
    return is_there;
  }

  // A frame for Python: it stays in place until the next call.
  int hold(int fd, Arrival& arrival) {
    const Inbox& in = peers_[held_ = last_odd_ = fd].in;
    const Frame frame = in.frame();
    arrival = {fd, int64_t(frame.number), int64_t(frame.length), in.data() + sizeof frame};
    return CAME;
  }

  void release() {
    if (const auto peer = peers_.find(held_); peer != peers_.end()) peer->second.in.drop_frame();
    held_ = -1;
  }

  int listener_ = -1;
  const int is_int8_, isa_;
  const long D_, F_, K_, num_experts_;
  std::vector<HeldLayer> layers_;
  const std::vector<double> bounds_;
  std::mutex computing_;
  std::map<int, Peer> peers_;
  std::vector<pollfd> watched_;
  std::vector<int64_t> rows_;
  Scratch x_, gates_, y_;
  std::atomic<bool> is_stopped_{false};
  int held_ = -1, last_odd_ = -1;  // whose frame Python has now, or had last
};

EXPORT Serving* outcrop_serving_new(int is_int8, int isa, long L, long num_experts, long D, long F, long K,
                                    const double* bounds, long num_bounds) {
  return new Serving(is_int8, isa, L, num_experts, D, F, K, bounds, num_bounds);
}

EXPORT const ServingCounts* outcrop_serving_counts(Serving* serving) { return &serving->counts; }

EXPORT void outcrop_serving_set_layer(Serving* serving, long layer, const char* packed, long E, const int64_t* rows) {
  serving->set_layer(layer, packed, E, rows);
}

EXPORT void outcrop_serving_listen(Serving* serving, int listener) { serving->listen(listener); }

EXPORT void outcrop_serving_add(Serving* serving, int peer) { serving->add(peer); }

EXPORT int outcrop_serving_run(Serving* serving, long threads, long milliseconds, Arrival* arrival) {
  return serving->run(threads, milliseconds, *arrival);
}

EXPORT void outcrop_serving_answer(Serving* serving, int64_t peer, int64_t number, const char* message, long length) {
  serving->answer(peer, number, message, length);
}

EXPORT void outcrop_serving_stop(Serving* serving) { serving->stop(); }

EXPORT void outcrop_serving_close(Serving* serving) { serving->close_peers(); }

EXPORT long outcrop_serving_num_peers(Serving* serving) { return serving->num_peers(); }
