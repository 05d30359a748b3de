#include "host/safetensors.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cinttypes>
#include <cstring>

#include "host/error.h"

namespace {

constexpr uint64_t MAX_HEADER = 100'000'000;      // safetensors' own bound
constexpr uint64_t MAX_DATA = uint64_t{1} << 46;  // of shapes alone: more than any model, and no address overflows

size_t element_bytes(const std::string& dtype) {
  static const std::map<std::string, size_t> known = {{"F32", 4}, {"BF16", 2}, {"F16", 2}, {"I8", 1}, {"U8", 1}};
  const auto found = known.find(dtype);
  return found == known.end() ? 0 : found->second;
}

// A model in another form: the command that makes ours of it.
[[noreturn]] void refuse_kind(const std::string& path, const char* kind, const std::string& source) {
  fail("%s: %s, not a model file of export.py: make run MODEL=%s makes one and runs it", path.c_str(), kind,
       source.c_str());
}

std::string folder_of(const std::string& path) {
  const size_t slash = path.rfind('/');
  return slash == path.npos ? "." : path.substr(0, std::max<size_t>(slash, 1));
}

}  // namespace

MappedFile::MappedFile(const std::string& path) {
  fd_ = open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);  // a pipe is refused, not waited for
  if (fd_ < 0) fail("%s: cannot open the model: %s", path.c_str(), std::strerror(errno));
  const bool known = fstat(fd_, &info_) == 0, folder = known && S_ISDIR(info_.st_mode);
  const bool regular = known && S_ISREG(info_.st_mode);
  if (regular && info_.st_size >= 8) {
    size_ = static_cast<size_t>(info_.st_size);
    void* p = mmap(nullptr, size_, PROT_READ, MAP_PRIVATE, fd_, 0);
    data_ = p == MAP_FAILED ? nullptr : static_cast<const std::byte*>(p);
  }
  if (!data_) close(fd_);
  if (folder) refuse_kind(path, "a folder", path);
  if (!regular) fail("%s: not a file; give the .safetensors that export.py wrote", path.c_str());
  if (size_ == 0)
    fail("%s: only %lld bytes; a model file is longer", path.c_str(), static_cast<long long>(info_.st_size));
  if (!data_) fail("%s: cannot map %zu bytes: %s", path.c_str(), size_, std::strerror(errno));
}

MappedFile::~MappedFile() {
  munmap(const_cast<std::byte*>(data_), size_);
  close(fd_);
}

bool MappedFile::begins_with(std::string_view magic) const {
  return std::memcmp(data_, magic.data(), magic.size()) == 0;
}

// Past a new end the last page reads as zeros.
void MappedFile::refuse_changed(const std::string& path) const {
  struct stat now {};
  const auto same = [](const timespec& a, const timespec& b) { return a.tv_sec == b.tv_sec && a.tv_nsec == b.tv_nsec; };
  if (fstat(fd_, &now) != 0 || now.st_size != info_.st_size || !same(now.st_mtim, info_.st_mtim))
    fail("%s: was written to while it was read: start again once it is whole", path.c_str());
}

void MappedFile::release(const void* first, const void* last) const {
  const auto page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  const auto begin = (reinterpret_cast<uintptr_t>(first) + page - 1) / page * page;
  const auto end = reinterpret_cast<uintptr_t>(last) / page * page;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_DONTNEED);
}

std::string shape_text(const std::vector<int64_t>& shape) {
  std::string text = "[";
  for (size_t i = 0; i < shape.size(); i++) text += (i ? ", " : "") + std::to_string(shape[i]);
  return text + "]";
}

Header::Header(const std::string& path, const MappedFile& file) : path_(path) {
  if (file.begins_with("GGUF")) refuse_kind(path, "a GGUF file", path);
  if (file.begins_with("PK\3\4")) refuse_kind(path, "a PyTorch checkpoint", folder_of(path));
  if (file.begins_with("attn.tok")) fail("%s: the tokenizer; the model lies beside it", path.c_str());
  uint64_t length = 0;
  std::memcpy(&length, file.data(), 8);
  if (length > MAX_HEADER || length > file.size() - 8)
    fail("%s: header length %" PRIu64 " does not fit the file's %zu bytes; truncated or not a safetensors file",
         path.c_str(), length, file.size());
  const char* text = reinterpret_cast<const char*>(file.data()) + 8;
  const Json json = parse_json({text, length}, path + ": the header");
  if (!json.object()) fail("%s: the header is not a JSON object", path.c_str());
  const Json* about = json.find("__metadata__");
  if (!about || (about->object() && !about->find("config") && !about->find("tokenizer_sha256")))
    refuse_kind(path, "weights of Hugging Face's layout", folder_of(path));
  const std::byte* data = file.data() + 8 + length;
  data_bytes_ = file.size() - 8 - static_cast<size_t>(length);
  for (const auto& [name, value] : *json.object()) {
    if (name == "__metadata__")
      read_metadata(value);
    else
      entries_.emplace(name, read_entry(name, value, data));
  }
  check_layout(data);
}

const Entry& Header::take(const std::string& name) {
  const auto found = entries_.find(name);
  if (found == entries_.end()) fail("%s: tensor %s is missing", path_.c_str(), name.c_str());
  found->second.taken = true;
  return found->second;
}

static std::vector<int64_t> spelled_like(const Entry& entry, std::vector<int64_t> shape) {
  if (shape.size() > 1 && shape[0] == 1 && entry.shape.size() != shape.size()) shape.erase(shape.begin());
  return shape;
}

const Entry& Header::take(const std::string& name, const char* dtype, const std::vector<int64_t>& shape) {
  const Entry& entry = take(name);
  if (entry.dtype != dtype || entry.shape != spelled_like(entry, shape)) refuse(name, dtype, shape);
  return entry;
}

void Header::refuse(const std::string& name, const char* dtype, const std::vector<int64_t>& shape) const {
  const Entry& entry = entries_.at(name);
  fail("%s: tensor %s is %s %s, expected %s %s", path_.c_str(), name.c_str(), entry.dtype.c_str(),
       shape_text(entry.shape).c_str(), dtype, shape_text(spelled_like(entry, shape)).c_str());
}

void Header::refuse_unused() const {
  for (const auto& [name, entry] : entries_)
    if (!entry.taken)
      fail("%s: tensor %s %s is not one that this model's config calls for", path_.c_str(), name.c_str(),
           shape_text(entry.shape).c_str());
}

void Header::read_metadata(const Json& value) {
  if (!value.object()) fail("%s: __metadata__ is not a JSON object", path_.c_str());
  for (const auto& [key, text] : *value.object()) {
    if (!text.string()) fail("%s: __metadata__ \"%s\" is not a string", path_.c_str(), key.c_str());
    metadata_[key] = *text.string();
  }
}

Entry Header::read_entry(const std::string& name, const Json& value, const std::byte* data) const {
  const auto bad = [&](const char* field, const char* why) {
    fail("%s: tensor %s: %s %s", path_.c_str(), name.c_str(), field, why);
  };
  const Json *dtype = value.find("dtype"), *shape = value.find("shape"), *offsets = value.find("data_offsets");
  if (!dtype || !shape || !offsets || value.object()->size() != 3)
    bad("entry", "must hold dtype, shape and data_offsets and nothing else");
  Entry entry;
  if (!dtype->string()) bad("dtype", "is not a string");
  entry.dtype = *dtype->string();
  const size_t element = element_bytes(entry.dtype);
  if (!element) bad("dtype", ("is " + entry.dtype + ", not one of F32, BF16, F16, I8, U8").c_str());
  if (!shape->array() || shape->array()->size() > 3) bad("shape", "is not an array of at most 3 integers");
  size_t bytes = element;
  for (const Json& d : *shape->array()) {
    const int n = d.integer<int>().value_or(-1);
    if (n < 0) bad("shape", "has a size that is not 0 .. 2^31 - 1");
    entry.shape.push_back(n);
    if (__builtin_mul_overflow(bytes, static_cast<size_t>(n), &bytes)) bad("shape", "overflows");
  }
  const auto offset = [&](size_t i) {
    const auto x =
        offsets->array() && offsets->array()->size() == 2 ? (*offsets->array())[i].integer<uint64_t>() : std::nullopt;
    if (!x) bad("data_offsets", "is not two integers");
    return *x;
  };
  const uint64_t begin = offset(0), end = offset(1);
  if (begin > end || end > (shapes_alone() ? MAX_DATA : data_bytes_))
    fail("%s: tensor %s: data_offsets [%" PRIu64 ", %" PRIu64 "] lie outside the file's %zu bytes of data; truncated?",
         path_.c_str(), name.c_str(), begin, end, data_bytes_);
  if (end - begin != bytes)
    fail("%s: tensor %s: %s %s needs %zu bytes, data_offsets give %" PRIu64, path_.c_str(), name.c_str(),
         entry.dtype.c_str(), shape_text(entry.shape).c_str(), bytes, end - begin);
  entry.data = data + begin;
  entry.bytes = bytes;
  if (reinterpret_cast<uintptr_t>(entry.data) % element != 0)
    bad("data_offsets", "are not aligned to the element's size; make the file with export.py");
  return entry;
}

void Header::check_layout(const std::byte* data) const {
  std::vector<std::pair<const Entry*, const std::string*>> order;
  for (const auto& [name, entry] : entries_) order.emplace_back(&entry, &name);
  std::sort(order.begin(), order.end(), [](const auto& a, const auto& b) {
    return std::pair(a.first->data, a.first->bytes) < std::pair(b.first->data, b.first->bytes);
  });
  const std::byte* end = data;
  for (const auto& [entry, name] : order) {
    if (entry->data != end)
      fail("%s: tensor %s: data_offsets %s the tensor before", path_.c_str(), name->c_str(),
           entry->data < end ? "overlap" : "leave a hole after");
    end = entry->data + entry->bytes;
  }
  if (!shapes_alone() && end != data + data_bytes_)
    fail("%s: %zu bytes after the last tensor", path_.c_str(), static_cast<size_t>(data + data_bytes_ - end));
}
