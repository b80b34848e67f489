// Which masks and positions the indices were made from that compiled code holds, and what stood in them then.
//
// Eager code compares torch's version numbers before it calls an operator (kronblocks/ops/pattern.py). Compiled code cannot; it
// asks the operator to look, which compares bytes.
#pragma once

#include <cstdint>
#include <cstring>
#include <mutex>
#include <shared_mutex>
#include <unordered_map>
#include <vector>

namespace kronblocks {

struct Bytes {
  const void* begin;
  std::int64_t size;
};

class Watched {
 public:
  // What is watched must stay in memory until the index is forgotten.
  void watch(const void* index, const std::vector<Bytes>& sources) {
    std::vector<Source> entry;
    for (const Bytes& bytes : sources) {
      const auto* begin = static_cast<const char*>(bytes.begin);
      entry.push_back({begin, std::vector<char>(begin, begin + bytes.size)});
    }
    std::unique_lock lock(mutex_);
    entries_.insert_or_assign(index, std::move(entry));
  }

  void forget(const void* index) {
    std::unique_lock lock(mutex_);
    entries_.erase(index);
  }

  // Whether nobody has written into its sources since; so it is where nothing is known of this index.
  bool is_current(const void* index) const {
    std::shared_lock lock(mutex_);
    const auto found = entries_.find(index);
    if (found == entries_.end()) return true;
    for (const Source& s : found->second)
      if (!s.then.empty() && std::memcmp(s.now, s.then.data(), s.then.size())) return false;
    return true;
  }

 private:
  struct Source {
    const char* now;
    std::vector<char> then;
  };

  mutable std::shared_mutex mutex_;
  std::unordered_map<const void*, std::vector<Source>> entries_;
};

}  // namespace kronblocks
