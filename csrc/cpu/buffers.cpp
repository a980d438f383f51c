#include "buffers.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <iterator>
#include <list>
#include <mutex>
#include <new>
#include <unordered_map>

namespace omnimoe::cpu {

namespace {

constexpr int64_t kLeastKept = 256 << 10;  // smaller blocks the C library keeps by itself

class Buffers {
 public:
  Buffers() {
    const char* wish = std::getenv("OMNIMOE_KEEP_MEMORY");
    keeps_ = !wish || std::strcmp(wish, "0");
  }

  void* take(int64_t bytes) {
    bytes = std::max<int64_t>((bytes + 63) / 64 * 64, 64);
    const std::lock_guard lock(mutex_);
    Block block{nullptr, bytes};
    // the block that was freed last of those that fit and waste an eighth at most
    const auto found = std::find_if(free_.rbegin(), free_.rend(), [&](const Block& held) {
      return held.size >= bytes && held.size <= bytes + bytes / 8;
    });
    if (found != free_.rend()) {
      block = *found;
      free_.erase(std::next(found).base());
      kept_ -= block.size;
    } else if (!(block.data = std::aligned_alloc(64, bytes))) {
      throw std::bad_alloc();
    }
    used_ += block.size;
    most_ = std::max(most_, used_);
    sizes_[block.data] = block.size;
    return block.data;
  }

  void give(void* data) {
    const std::lock_guard lock(mutex_);
    const auto held = sizes_.find(data);
    const Block block{data, held->second};
    sizes_.erase(held);
    used_ -= block.size;
    if (!keeps_ || block.size < kLeastKept) return std::free(data);
    free_.push_back(block);
    kept_ += block.size;
    for (; kept_ > most_; free_.pop_front()) {
      kept_ -= free_.front().size;
      std::free(free_.front().data);
    }
  }

 private:
  struct Block {
    void* data;
    int64_t size;
  };

  std::mutex mutex_;
  std::list<Block> free_;  // the longest free first
  std::unordered_map<void*, int64_t> sizes_;
  int64_t kept_ = 0, used_ = 0, most_ = 0;
  bool keeps_;
};

Buffers& buffers() {
  static Buffers* kept = new Buffers;  // never destroyed: tensors may outlive it
  return *kept;
}

}  // namespace

void* take_buffer(int64_t bytes) { return buffers().take(bytes); }
void give_buffer(void* data) { buffers().give(data); }

}  // namespace omnimoe::cpu
