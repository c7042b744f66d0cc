// Bytes over a non-blocking stream socket: what is sent in pieces, and what comes in pieces. Nothing here waits.

#pragma once

#include <cerrno>
#include <ctime>

#include <sys/socket.h>
#include <sys/uio.h>

#include "common.h"

inline int64_t now_ns() {
  timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return int64_t(now.tv_sec) * 1'000'000'000 + now.tv_nsec;
}

inline bool would_wait() { return errno == EAGAIN || errno == EWOULDBLOCK || errno == EINTR; }

// A message that lies in several places, and how far it has been sent.
class Outgoing {
 public:
  void clear() { pieces_.clear(), next_ = 0, sent = total = 0; }

  // The bytes stay where they are until they are sent. Neighbours become one piece.
  void add(const void* data, size_t bytes) {
    if (!bytes) return;
    total += bytes;
    if (!pieces_.empty() && static_cast<char*>(pieces_.back().iov_base) + pieces_.back().iov_len == data)
      pieces_.back().iov_len += bytes;
    else
      pieces_.push_back({const_cast<void*>(data), bytes});
  }

  bool is_done() const { return sent == total; }

  // As much as the other end takes now. False if it is gone.
  bool send(int fd) {
    while (!is_done()) {
      msghdr message = {};
      message.msg_iov = &pieces_[next_];
      message.msg_iovlen = std::min<size_t>(MOST_PIECES, pieces_.size() - next_);
      const ssize_t some = sendmsg(fd, &message, MSG_DONTWAIT | MSG_NOSIGNAL);
      if (some < 0) return would_wait();
      advance(some);
    }
    return true;
  }

  // What has not been sent, one behind the other.
  void copy_rest(std::vector<char>& to) const {
    for (size_t i = next_; i < pieces_.size(); ++i) {
      const char* data = static_cast<const char*>(pieces_[i].iov_base);
      to.insert(to.end(), data, data + pieces_[i].iov_len);
    }
  }

  size_t sent = 0, total = 0;

 private:
  static constexpr size_t MOST_PIECES = 512;  // the system takes 1024

  void advance(size_t bytes) {
    sent += bytes;
    while (bytes) {
      iovec& piece = pieces_[next_];
      const size_t some = std::min(bytes, piece.iov_len);
      piece.iov_base = static_cast<char*>(piece.iov_base) + some, piece.iov_len -= some, bytes -= some;
      if (!piece.iov_len) ++next_;
    }
  }

  std::vector<iovec> pieces_;
  size_t next_ = 0;
};

// Reads what has come into [at, most) of `data`. Moves `at`; false if the other end is gone. A read that yields less than
// it asks for has emptied the socket.
inline bool receive_some(int fd, char* data, size_t& at, size_t most) {
  if (at == most) return true;
  const ssize_t some = recv(fd, data + at, most - at, MSG_DONTWAIT);
  if (some == 0) return false;
  if (some < 0) return would_wait();
  at += some;
  return true;
}
