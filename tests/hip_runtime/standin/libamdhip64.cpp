// A HIP runtime for machines without an AMD GPU: the part of libamdhip64.so that loads a code object and launches its kernel.
//
// It reads the code object as ROCm's runtime does (ELF header, target, metadata note), refuses what that one refuses, with the same
// error codes, and takes each argument from where the metadata says.  The kernel itself then runs as its host build.
//
//   MLAGEN_STANDIN_DEVICES   the GPUs, by architecture: gfx942,gfx950
//   MLAGEN_STANDIN_KERNELS   a folder with NAME.co, a code object, beside NAME.so, the host build of its one kernel
//
// Where ROCm 6 and 7 differ in a code, this is ROCm 7.  It is stricter than a real runtime where that one would read or compute
// garbage; those places say so.

#include <dirent.h>
#include <dlfcn.h>
#include <elf.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include <algorithm>
#include <atomic>
#include <fstream>
#include <iterator>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <stdexcept>
#include <string>
#include <thread>
#include <utility>
#include <vector>

namespace {

// hip_runtime_api.h: the errors that are used here, and two of its handles.
#define ERRORS(ERROR)                                                                      \
    ERROR(hipSuccess, 0, "no error")                                                       \
    ERROR(hipErrorInvalidValue, 1, "invalid argument")                                     \
    ERROR(hipErrorInvalidConfiguration, 9, "invalid configuration argument")               \
    ERROR(hipErrorInvalidDevice, 101, "invalid device ordinal")                            \
    ERROR(hipErrorInvalidImage, 200, "device kernel image is invalid")                     \
    ERROR(hipErrorNoBinaryForGpu, 209, "no kernel image is available for execution on the device") \
    ERROR(hipErrorInvalidHandle, 400, "invalid resource handle")                           \
    ERROR(hipErrorNotFound, 500, "named symbol not found")                                 \
    ERROR(hipErrorIllegalAddress, 700, "an illegal memory access was encountered")         \
    ERROR(hipErrorContextIsDestroyed, 709, "context is destroyed")                         \
    ERROR(hipErrorLaunchFailure, 719, "unspecified launch failure")

enum Error {
#define ERROR(name, code, text) name = code,
    ERRORS(ERROR)
#undef ERROR
};

const uintptr_t STREAM_LEGACY = 1, STREAM_PER_THREAD = 2;
enum Attribute { MAX_THREADS_PER_BLOCK = 0, SHARED_SIZE_BYTES = 1, LOCAL_SIZE_BYTES = 3, NUM_REGS = 4 };
const uint32_t MAX_BLOCK = 1024;

// A MessagePack value; the metadata uses maps, arrays, strings, integers and booleans.
struct Value {
    uint64_t number = 0;
    std::string text;
    std::vector<Value> items;
    std::map<std::string, Value> members;

    const Value& at(const char* key) const { return members.at(key); }
    uint32_t size_at(const char* key) const { return uint32_t(members.at(key).number); }
};

class MessagePack {
public:
    MessagePack(const unsigned char* at, size_t size) : at_(at), end_(at + size) {}

    Value read()
    {
        Value value;
        const unsigned tag = unsigned(big_endian(1));
        if (tag < 0x80) value.number = tag;
        else if (tag < 0x90) read_map(value, tag & 15);
        else if (tag < 0xa0) read_array(value, tag & 15);
        else if (tag < 0xc0) value.text = bytes(tag & 31);
        else if (tag == 0xc2 || tag == 0xc3) value.number = tag & 1;
        else if (tag >= 0xcc && tag <= 0xcf) value.number = big_endian(1u << (tag - 0xcc));
        else if (tag >= 0xd9 && tag <= 0xdb) value.text = bytes(big_endian(1u << (tag - 0xd9)));
        else if (tag == 0xdc || tag == 0xdd) read_array(value, big_endian(tag == 0xdc ? 2 : 4));
        else if (tag == 0xde || tag == 0xdf) read_map(value, big_endian(tag == 0xde ? 2 : 4));
        else throw std::runtime_error("metadata of an unknown type");
        return value;
    }

private:
    std::string bytes(size_t size)
    {
        if (size > size_t(end_ - at_)) throw std::runtime_error("metadata is cut off");
        at_ += size;
        return std::string(reinterpret_cast<const char*>(at_ - size), size);
    }

    uint64_t big_endian(size_t size)
    {
        uint64_t number = 0;
        for (unsigned char byte : bytes(size)) number = number << 8 | byte;
        return number;
    }

    void read_array(Value& value, uint64_t count)
    {
        for (uint64_t i = 0; i < count; ++i) value.items.push_back(read());
    }

    void read_map(Value& value, uint64_t count)
    {
        for (uint64_t i = 0; i < count; ++i) {
            const std::string key = read().text;
            value.members[key] = read();
        }
    }

    const unsigned char *at_, *end_;
};

using HostLaunch = int (*)(uint32_t grid, void** parameters, uint32_t cpu_threads, char* error, size_t error_size);

struct Parameter { uint32_t offset, size; };

struct Function {
    struct Module* module;
    std::vector<Parameter> parameters;
    uint32_t arguments_size = 0;  // up to the end of the last one that the caller gives
    uint32_t threads, registers, scratch_bytes, lds_bytes;
};

struct Module {
    int device;
    const unsigned char* image;  // the caller's memory, as in ROCm's runtime
    std::vector<unsigned char> as_loaded;
    HostLaunch launch = nullptr;
    std::map<std::string, Function> functions;
};

struct Launch { uint64_t stream, device; };

std::mutex lock;
std::map<const void*, std::unique_ptr<Module>> modules;
std::set<const void*> functions;
std::map<const void*, int> streams;  // and the device of each
std::atomic<uint64_t> launches{0};
thread_local int current_device = 0;
thread_local Launch last_launch{};

Error complain(Error error, const std::string& what)
{
    std::fprintf(stderr, "libamdhip64 stand-in: %s\n", what.c_str());
    return error;
}

const std::vector<std::string>& devices()
{
    static const std::vector<std::string> all = [] {
        std::vector<std::string> found(1);
        for (const char* c = std::getenv("MLAGEN_STANDIN_DEVICES"); c && *c; ++c) {
            if (*c == ',') found.emplace_back();
            else found.back() += *c;
        }
        return found;
    }();
    return all;
}

// EF_AMDGPU_MACH, the low byte of e_flags.
std::string machine(uint32_t flags)
{
    switch (flags & 0xff) {
    case 0x4c: return "gfx942";
    case 0x4f: return "gfx950";
    default: return "another GPU";
    }
}

size_t image_size(const Elf64_Ehdr& header) { return header.e_shoff + size_t(header.e_shentsize) * header.e_shnum; }

Value read_metadata(const unsigned char* image)
{
    const auto& header = *reinterpret_cast<const Elf64_Ehdr*>(image);
    for (int i = 0; i < header.e_phnum; ++i) {
        const auto& segment = *reinterpret_cast<const Elf64_Phdr*>(image + header.e_phoff + i * header.e_phentsize);
        for (size_t at = 0; segment.p_type == PT_NOTE && at < segment.p_filesz;) {
            const unsigned char* start = image + segment.p_offset + at;
            const auto& note = *reinterpret_cast<const Elf64_Nhdr*>(start);
            const size_t name_size = (note.n_namesz + 3) & ~size_t(3), text_size = (note.n_descsz + 3) & ~size_t(3);
            const auto* owner = reinterpret_cast<const char*>(start + sizeof note);
            if (note.n_type == 32 && !std::strcmp(owner, "AMDGPU"))
                return MessagePack(start + sizeof note + name_size, note.n_descsz).read();
            at += sizeof note + name_size + text_size;
        }
    }
    throw std::runtime_error("no metadata");
}

Function read_function(const Value& kernel, Module* module)
{
    Function function;
    function.module = module;
    function.threads = kernel.size_at(".max_flat_workgroup_size");
    function.registers = kernel.size_at(".vgpr_count");
    function.scratch_bytes = kernel.size_at(".private_segment_fixed_size");
    function.lds_bytes = kernel.size_at(".group_segment_fixed_size");
    for (const Value& argument : kernel.at(".args").items) {
        if (!argument.at(".value_kind").text.compare(0, 7, "hidden_")) continue;  // what a runtime adds itself
        const Parameter parameter{argument.size_at(".offset"), argument.size_at(".size")};
        function.parameters.push_back(parameter);
        function.arguments_size = std::max(function.arguments_size, parameter.offset + parameter.size);
    }
    return function;
}

// The host build that lies beside a code object of the same bytes; null if there is none.
HostLaunch host_build(const std::vector<unsigned char>& image)
{
    const char* named = std::getenv("MLAGEN_STANDIN_KERNELS");
    const std::string folder = named ? named : ".";
    HostLaunch launch = nullptr;
    if (DIR* listing = opendir(folder.c_str())) {
        while (const dirent* entry = readdir(listing)) {
            const std::string file = entry->d_name;
            if (launch || file.size() < 4 || file.compare(file.size() - 3, 3, ".co")) continue;
            std::ifstream stream(folder + "/" + file, std::ios::binary);
            const std::vector<unsigned char> bytes{std::istreambuf_iterator<char>(stream), {}};
            if (bytes != image) continue;
            const std::string library = folder + "/" + file.substr(0, file.size() - 3) + ".so";
            if (void* handle = dlopen(library.c_str(), RTLD_NOW | RTLD_LOCAL))
                launch = reinterpret_cast<HostLaunch>(dlsym(handle, "mlagen_host_launch"));
            else
                complain(hipErrorInvalidImage, dlerror());
        }
        closedir(listing);
    }
    return launch;
}

bool known_stream(const void* stream, int* device)
{
    const auto handle = reinterpret_cast<uintptr_t>(stream);
    *device = current_device;
    if (handle == 0 || handle == STREAM_LEGACY || handle == STREAM_PER_THREAD) return true;
    const std::lock_guard<std::mutex> hold(lock);
    const auto found = streams.find(stream);
    if (found != streams.end()) *device = found->second;
    return found != streams.end();
}

const Function* known_function(const void* handle)
{
    const std::lock_guard<std::mutex> hold(lock);
    return functions.count(handle) ? static_cast<const Function*>(handle) : nullptr;
}

Error run(const Function& function, uint32_t grid, uint32_t block, void** parameters, void** extra)
{
    const Module& module = *function.module;
    if (std::memcmp(module.image, module.as_loaded.data(), module.as_loaded.size()))  // a debugger or a profiler reads it there
        return complain(hipErrorIllegalAddress, "the code object has left its memory while its module is loaded");
    if (block > function.threads) return hipErrorLaunchFailure;
    if (block < function.threads)  // a real one runs it, with lanes missing
        return complain(hipErrorInvalidConfiguration, "a block smaller than the kernel's");
    if (!parameters || extra) return hipErrorInvalidValue;  // a real one takes the arguments in `extra`, too
    std::vector<unsigned char> segment(function.arguments_size);
    std::vector<void*> addresses;
    for (size_t i = 0; i < function.parameters.size(); ++i) {
        const Parameter& parameter = function.parameters[i];
        if (!parameters[i]) return complain(hipErrorInvalidValue, "no argument number " + std::to_string(i));  // a real one crashes
        std::memcpy(&segment[parameter.offset], parameters[i], parameter.size);
        addresses.push_back(&segment[parameter.offset]);
    }
    char error[256] = "";
    if (module.launch(grid, addresses.data(), std::max(1u, std::thread::hardware_concurrency()), error, sizeof error))
        return complain(hipErrorLaunchFailure, error);
    return hipSuccess;
}

}  // namespace

extern "C" {

Error hipInit(unsigned) { return hipSuccess; }

Error hipRuntimeGetVersion(int* version)
{
    *version = 70200000;
    return hipSuccess;
}

Error hipGetDeviceCount(int* count)
{
    *count = int(devices().size());
    return hipSuccess;
}

Error hipGetDevice(int* device)
{
    *device = current_device;
    return hipSuccess;
}

Error hipSetDevice(int device)
{
    if (device < 0 || device >= int(devices().size())) return hipErrorInvalidDevice;
    current_device = device;
    return hipSuccess;
}

const char* hipGetErrorName(Error error)
{
    switch (error) {
#define ERROR(name, code, text) \
    case name: return #name;
        ERRORS(ERROR)
#undef ERROR
    }
    return "hipErrorUnknown";
}

const char* hipGetErrorString(Error error)
{
    switch (error) {
#define ERROR(name, code, text) \
    case name: return text;
        ERRORS(ERROR)
#undef ERROR
    }
    return "unknown error";
}

Error hipStreamCreate(void** stream)
{
    *stream = new char;
    const std::lock_guard<std::mutex> hold(lock);
    streams[*stream] = current_device;
    return hipSuccess;
}

Error hipStreamDestroy(void* stream)
{
    const std::lock_guard<std::mutex> hold(lock);
    return streams.erase(stream) ? hipSuccess : hipErrorContextIsDestroyed;  // its address is not used again
}

Error hipStreamSynchronize(void* stream)
{
    int device;
    return known_stream(stream, &device) ? hipSuccess : hipErrorContextIsDestroyed;  // every launch waits for its end
}

Error hipModuleLoadData(void** handle, const void* data)
{
    if (!handle || !data) return hipErrorInvalidValue;
    const auto* image = static_cast<const unsigned char*>(data);
    if (std::memcmp(image, ELFMAG, SELFMAG)) return hipErrorInvalidImage;
    const auto& header = *static_cast<const Elf64_Ehdr*>(data);
    if (header.e_ident[EI_CLASS] != ELFCLASS64 || header.e_machine != 224 || !header.e_shoff) return hipErrorInvalidImage;
    if (machine(header.e_flags) != devices()[current_device])
        return complain(hipErrorNoBinaryForGpu, "code for " + machine(header.e_flags) + ", this is " + devices()[current_device]);
    std::unique_ptr<Module> module(new Module);
    module->device = current_device;
    module->image = image;
    module->as_loaded.assign(image, image + image_size(header));
    try {
        const Value metadata = read_metadata(image);
        for (const Value& kernel : metadata.at("amdhsa.kernels").items)
            module->functions.emplace(kernel.at(".name").text, read_function(kernel, module.get()));
    } catch (const std::exception& problem) {
        return complain(hipErrorNoBinaryForGpu, problem.what());
    }
    module->launch = host_build(module->as_loaded);
    if (!module->launch) return complain(hipErrorNoBinaryForGpu, "no host build of this code object in MLAGEN_STANDIN_KERNELS");
    *handle = module.get();
    const std::lock_guard<std::mutex> hold(lock);
    modules[*handle] = std::move(module);
    return hipSuccess;
}

Error hipModuleUnload(void* handle)
{
    const std::lock_guard<std::mutex> hold(lock);
    const auto found = modules.find(handle);
    if (found == modules.end()) return hipErrorNotFound;
    for (const auto& function : found->second->functions) functions.erase(&function.second);
    modules.erase(found);
    return hipSuccess;
}

Error hipModuleGetFunction(const void** function, void* handle, const char* name)
{
    if (!function || !name || !*name) return hipErrorInvalidValue;
    const std::lock_guard<std::mutex> hold(lock);
    const auto module = modules.find(handle);
    if (module == modules.end()) return hipErrorNotFound;
    if (module->second->device != current_device) {  // as ROCm 6 does
        complain(hipErrorInvalidDevice, "the module is of another device");
        std::abort();
    }
    const auto found = module->second->functions.find(name);
    if (found == module->second->functions.end()) return hipErrorNotFound;
    *function = &found->second;
    functions.insert(*function);
    return hipSuccess;
}

Error hipFuncGetAttribute(int* value, int attribute, const void* handle)
{
    const Function* function = known_function(handle);
    if (!value) return hipErrorInvalidValue;
    if (!function) return hipErrorInvalidHandle;
    if (function->module->device != current_device) {  // ROCm follows a null pointer
        complain(hipErrorInvalidDevice, "the function is of another device");
        std::abort();
    }
    switch (attribute) {
    case MAX_THREADS_PER_BLOCK: *value = int(function->threads); return hipSuccess;
    case SHARED_SIZE_BYTES: *value = int(function->lds_bytes); return hipSuccess;
    case LOCAL_SIZE_BYTES: *value = int(function->scratch_bytes); return hipSuccess;
    case NUM_REGS: *value = int(function->registers); return hipSuccess;
    default: return hipErrorInvalidValue;
    }
}

Error hipModuleLaunchKernel(const void* handle, uint32_t grid_x, uint32_t grid_y, uint32_t grid_z,
                            uint32_t block_x, uint32_t block_y, uint32_t block_z, uint32_t shared_bytes, void* stream,
                            void** parameters, void** extra)
{
    int device;
    if (!known_stream(stream, &device)) return hipErrorContextIsDestroyed;
    const uint64_t work_items = uint64_t(grid_x) * block_x;
    if (!work_items || work_items >> 32 || block_x > MAX_BLOCK) return hipErrorInvalidValue;
    if (device != current_device) return hipErrorInvalidHandle;
    const Function* function = known_function(handle);
    if (!function) return hipErrorInvalidHandle;
    if (function->module->device != device) return hipErrorInvalidDevice;
    if (grid_y != 1 || grid_z != 1 || block_y != 1 || block_z != 1 || shared_bytes)  // a real one takes them
        return complain(hipErrorInvalidConfiguration, "these kernels have one dimension and no dynamic LDS");
    const Error error = run(*function, grid_x, block_x, parameters, extra);
    if (error == hipSuccess) {
        last_launch = {reinterpret_cast<uintptr_t>(stream), uint64_t(device)};
        ++launches;
    }
    return error;
}

// What tests ask; a real runtime has none of these.

const char* standin_arch(int device) { return devices()[device].c_str(); }

uint64_t standin_launches() { return launches; }

// The stream and the device of this thread's last launch.
void standin_last_launch(uint64_t* values) { std::memcpy(values, &last_launch, sizeof last_launch); }

}  // extern "C"
