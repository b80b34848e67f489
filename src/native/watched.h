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
#include <utility>

namespace kronblocks {

// What an index was made from: bytes that may change, and, where they are the same still, others that do not.
struct Source {
  const void *now, *then;
  std::int64_t size;
  bool same() const { return size == 0 || (then && std::memcmp(now, then, std::size_t(size)) == 0); }
};

class Watched {
 public:
  // The sources must stay in memory until the index is forgotten.
  void watch(const void* index, Source mask, Source position) {
    std::unique_lock lock(mutex_);
    entries_.insert_or_assign(index, std::make_pair(mask, position));
  }

  void forget(const void* index) {
    std::unique_lock lock(mutex_);
    entries_.erase(index);
  }

  // Whether nobody has written into its sources since; so it is where nothing is known of this index.
  bool is_current(const void* index) const {
    std::shared_lock lock(mutex_);
    const auto found = entries_.find(index);
    return found == entries_.end() || (found->second.first.same() && found->second.second.same());
  }

 private:
  mutable std::shared_mutex mutex_;
  std::unordered_map<const void*, std::pair<Source, Source>> entries_;
};

}  // namespace kronblocks
