// Runs recorded calls of the launchers again (simt/trace.py has the format), every piece of memory in an allocation of
// its own, and compares what they leave with what was recorded, bit for bit: another order of threads and blocks must
// give the same. For AddressSanitizer and ThreadSanitizer, which Python can't be run under.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <memory>
#include <string>
#include <vector>

extern "C" void simt_seed(uint64_t seed);
extern "C" const char* simt_call(const char* name, void* const* values, const size_t* sizes, size_t count);

namespace {

class File {
 public:
  explicit File(const char* path) : stream_(path, std::ios::binary) {}
  uint64_t number() {
    uint64_t x = 0;
    stream_.read(reinterpret_cast<char*>(&x), sizeof x);
    return x;
  }
  std::string bytes() {
    std::string x(number(), '\0');
    stream_.read(x.data(), static_cast<std::streamsize>(x.size()));
    return x;
  }
  bool has_more() { return stream_.peek() != std::ifstream::traits_type::eof(); }
  bool good() const { return stream_.good(); }

 private:
  std::ifstream stream_;
};

// Exactly so many bytes behind an address with these last four bits, as recorded: kernels choose by alignment.
struct Memory {
  void* allocated = nullptr;
  char* data = nullptr;
  std::string wanted;

  Memory(uint64_t alignment, const std::string& before, std::string after) : wanted(std::move(after)) {
    if (posix_memalign(&allocated, 16, alignment + before.size()) != 0) std::abort();
    data = static_cast<char*>(allocated) + alignment;
    std::memcpy(data, before.data(), before.size());
  }
  Memory(Memory&& other) noexcept : allocated(other.allocated), data(other.data), wanted(std::move(other.wanted)) {
    other.allocated = nullptr;
  }
  ~Memory() { std::free(allocated); }
};

// Whether the next call of the file leaves what was recorded.
bool replay(File& file) {
  const std::string name = file.bytes();
  std::vector<Memory> memory;
  for (uint64_t count = file.number(); count > 0; --count) {
    const uint64_t alignment = file.number();
    const std::string before = file.bytes();
    memory.emplace_back(alignment, before, file.bytes());
  }
  std::vector<std::string> arguments;
  for (uint64_t count = file.number(); count > 0; --count) {
    std::string argument = file.bytes();
    for (uint64_t pointers = file.number(); pointers > 0; --pointers) {
      const uint64_t place = file.number(), index = file.number(), offset = file.number();
      char* address = memory.at(index).data + offset;
      std::memcpy(argument.data() + place, &address, sizeof address);
    }
    arguments.push_back(std::move(argument));
  }
  if (!file.good()) {
    std::fprintf(stderr, "replay: the file is cut off\n");
    return false;
  }
  std::vector<void*> values;
  std::vector<size_t> sizes;
  for (std::string& argument : arguments) {
    values.push_back(argument.data());
    sizes.push_back(argument.size());
  }
  if (const char* failure = simt_call(name.c_str(), values.data(), sizes.data(), sizes.size())) {
    std::fprintf(stderr, "%s\n", failure);
    return false;
  }
  for (const Memory& piece : memory) {
    if (std::memcmp(piece.data, piece.wanted.data(), piece.wanted.size()) != 0) {
      std::fprintf(stderr, "replay: %s left something else than when it was recorded\n", name.c_str());
      return false;
    }
  }
  return true;
}

}  // namespace

int main(int count, char** arguments) {
  if (count != 3) return 2;
  File file(arguments[1]);
  simt_seed(std::strtoull(arguments[2], nullptr, 10));
  int calls = 0;
  while (file.has_more()) {
    if (!replay(file)) return 1;
    ++calls;
  }
  std::printf("%d calls\n", calls);
  return calls > 0 ? 0 : 1;
}
