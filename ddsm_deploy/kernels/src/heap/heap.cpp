// A heap whose addresses are the same in every run of a program: preloaded into a process that builds an engine.
//
// TensorRT-RTX 1.7.1 numbers the open sizes inside an engine by the addresses of its own objects. From the system's
// heap these depend on where the kernel lays it and on which thread came first, and two engines of one graph differ.
// Here every thread has a region of its own at a fixed address, in the order of the threads' first requests, and in it
// every size class has a range. So the address of a block depends on what its thread asked for and gave back in that
// class before, and on nothing else: not on other threads, nor on how many texts of other sizes were printed meanwhile.
// A block that another thread gives back is not used again; a large one gives its memory back to the system either
// way. So a process may take more addresses than it needs, and for one build that is no loss.

#include <errno.h>
#include <stdint.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include <atomic>

namespace {

constexpr size_t KIB = 1024, MIB = KIB * KIB, GIB = MIB * KIB;
constexpr uintptr_t BASE = 16 * KIB * GIB;  // far from where Linux lays programs, libraries and stacks
constexpr size_t REGION = 256 * GIB;        // addresses of a thread
constexpr uint32_t REGIONS = 256;
constexpr size_t STEP = 16 * MIB;  // by which a range becomes usable
constexpr size_t PAGE = 4096;

constexpr size_t FINE = KIB;         // up to here a class for each 16 bytes, then four a power of two
constexpr size_t LARGE = 256 * KIB;  // beyond, memory that is given back goes back to the system
constexpr int FINE_CLASSES = FINE / 16;
constexpr int CLASSES = FINE_CLASSES + 4 * 28;  // 2^10 to 2^38
constexpr int REST = FINE_CLASSES + 4 * 8;      // classes from here on share the range behind those of the others
constexpr int RANGES = REST + 1;
constexpr size_t RANGE = GIB;  // addresses of a class

struct alignas(16) Block {
    size_t size;      // usable bytes behind it
    uint32_t region;  // whose it is
    int32_t bin;      // its class; -1 for those that are not used again
};
static_assert(sizeof(Block) == 16);

struct Range {
    uintptr_t top, usable;  // the next free address, and the end of what may be written to
    uintptr_t half, end;    // where it goes on after a restart, and its end
};

// Thread-local storage that is there from a thread's start: any other kind is itself allocated, by this heap.
#define OWN static thread_local __attribute__((tls_model("initial-exec")))
OWN uint32_t region_of_thread;  // from 1
OWN Range ranges[RANGES];
OWN void* free_blocks[CLASSES];  // lists through their first words
std::atomic<uint32_t> regions;

uintptr_t start_of(uint32_t region) { return BASE + (region - 1) * REGION; }

bool enter_region() {
    uint32_t number = ++regions;
    if (number > REGIONS) return false;
    uintptr_t start = start_of(number);
    // without access: limits on memory count what can be written to
    int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED_NOREPLACE;
    void* wanted = reinterpret_cast<void*>(start);
    if (mmap(wanted, REGION, PROT_NONE, flags, -1, 0) != wanted) return false;
    for (int bin = 0; bin < RANGES; ++bin) {
        uintptr_t first = start + bin * RANGE, end = bin == REST ? start + REGION : first + RANGE;
        ranges[bin] = {first, first, first + (end - first) / 2, end};
    }
    region_of_thread = number;
    return true;
}

// `size` further bytes of a range of the thread's, all zero; a multiple of 16.
void* fresh(Range& range, size_t size) {
    if (region_of_thread == 0 && !enter_region()) return nullptr;
    if (size > range.end - range.top) return nullptr;
    while (size > range.usable - range.top) {
        size_t more = (size - (range.usable - range.top) + STEP - 1) / STEP * STEP;
        if (more > range.end - range.usable) more = range.end - range.usable;
        if (mprotect(reinterpret_cast<void*>(range.usable), more, PROT_READ | PROT_WRITE) != 0) return nullptr;
        range.usable += more;
    }
    void* memory = reinterpret_cast<void*>(range.top);
    range.top += size;
    return memory;
}

int bin_of(size_t size) {  // of the smallest class that holds it
    if (size <= FINE) return size == 0 ? 0 : static_cast<int>((size - 1) / 16);
    int power = 63 - __builtin_clzll(size - 1);  // 2^power < size <= 2^(power + 1)
    return FINE_CLASSES + 4 * (power - 10) + static_cast<int>(((size - 1) >> (power - 2)) & 3);
}

size_t size_of(int bin) {
    if (bin < FINE_CLASSES) return 16 * (bin + 1);
    int coarse = bin - FINE_CLASSES;
    return size_t(5 + coarse % 4) << (coarse / 4 + 8);
}
static_assert((size_t{5} << 8) == FINE * 5 / 4, "the first coarse class");

void* failed() {
    errno = ENOMEM;
    return nullptr;
}

// A block that is not used again; `alignment` is a power of two.
void* take_aside(size_t size, size_t alignment) {
    if (size > REGION || alignment > REGION) return failed();
    size_t rounded = (size + 15) & ~size_t{15};
    void* memory = fresh(ranges[REST], sizeof(Block) + alignment + rounded);
    if (memory == nullptr) return failed();
    uintptr_t place = (reinterpret_cast<uintptr_t>(memory) + sizeof(Block) + alignment - 1) & ~(alignment - 1);
    auto* block = reinterpret_cast<Block*>(place) - 1;
    *block = {rounded, region_of_thread, -1};
    return block + 1;
}

void* take(size_t size, bool zero) {
    if (size > REGION) return failed();
    int bin = bin_of(size);
    if (void* again = free_blocks[bin]) {
        memcpy(&free_blocks[bin], again, sizeof(void*));
        if (zero) memset(again, 0, size);
        return again;
    }
    auto* block = static_cast<Block*>(fresh(ranges[bin < REST ? bin : REST], sizeof(Block) + size_of(bin)));
    if (block == nullptr) return take_aside(size, alignof(Block));  // its range is full, or no more memory is to be had
    *block = {size_of(bin), region_of_thread, bin};
    return block + 1;
}

void* take_aligned(size_t alignment, size_t size) {
    return alignment <= alignof(Block) ? take(size, false) : take_aside(size, alignment);
}

void give_back(void* memory) {
    auto* block = static_cast<Block*>(memory) - 1;
    if (block->size > LARGE) {
        int before = errno;
        uintptr_t first = (reinterpret_cast<uintptr_t>(memory) + PAGE - 1) & ~(PAGE - 1);
        uintptr_t last = (reinterpret_cast<uintptr_t>(memory) + block->size) & ~(PAGE - 1);
        madvise(reinterpret_cast<void*>(first), last - first, MADV_DONTNEED);
        errno = before;
    }
    if (block->bin < 0 || block->region != region_of_thread) return;
    memcpy(memory, &free_blocks[block->bin], sizeof(void*));
    free_blocks[block->bin] = memory;
}

}  // namespace

#define EXPORTED extern "C" __attribute__((visibility("default")))

EXPORTED void* malloc(size_t size) { return take(size, false); }

EXPORTED void free(void* memory) {
    if (memory != nullptr) give_back(memory);
}

EXPORTED void* calloc(size_t count, size_t size) {
    size_t bytes;
    return __builtin_mul_overflow(count, size, &bytes) ? failed() : take(bytes, true);
}

EXPORTED void* realloc(void* memory, size_t size) {
    if (memory == nullptr) return take(size, false);
    size_t held = (static_cast<Block*>(memory) - 1)->size;
    if (size <= held) return memory;
    void* larger = take(size, false);
    if (larger != nullptr) {
        memcpy(larger, memory, held);
        give_back(memory);
    }
    return larger;
}

EXPORTED void* reallocarray(void* memory, size_t count, size_t size) {
    size_t bytes;
    return __builtin_mul_overflow(count, size, &bytes) ? failed() : realloc(memory, bytes);
}

EXPORTED int posix_memalign(void** memory, size_t alignment, size_t size) {
    if (alignment < sizeof(void*) || (alignment & (alignment - 1))) return EINVAL;
    int before = errno;
    void* place = take_aligned(alignment, size);
    errno = before;
    if (place == nullptr) return ENOMEM;
    *memory = place;
    return 0;
}

EXPORTED void* aligned_alloc(size_t alignment, size_t size) { return take_aligned(alignment, size); }
EXPORTED void* memalign(size_t alignment, size_t size) { return take_aligned(alignment, size); }
EXPORTED void* valloc(size_t size) { return take_aligned(PAGE, size); }
EXPORTED void* pvalloc(size_t size) { return take_aligned(PAGE, (size + PAGE - 1) & ~(PAGE - 1)); }
EXPORTED size_t malloc_usable_size(void* memory) {
    return memory == nullptr ? 0 : (static_cast<Block*>(memory) - 1)->size;
}

// Forgets what the calling thread has given back and goes on at fixed addresses, so that what follows does not depend
// on what the program did before. 0, or -1 where the thread has used half of a range already.
EXPORTED int ddsm_heap_restart() {
    if (region_of_thread == 0 && !enter_region()) return -1;
    for (const Range& range : ranges)
        if (range.top > range.half) return -1;
    for (Range& range : ranges) range.top = range.usable = range.half;
    memset(free_blocks, 0, sizeof(free_blocks));
    return 0;
}
