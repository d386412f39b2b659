//! Where values live: one slab a thread, so that counting never writes a cache line that another worker writes.

use std::{
    alloc::{self, Layout},
    cell::{Cell, RefCell},
    ptr,
    sync::{
        LazyLock,
        atomic::{AtomicBool, AtomicPtr, AtomicU64, AtomicUsize, Ordering},
    },
};

use super::histogram::Buckets;

/// Slots of one chunk: 32 KiB of counters.
const CHUNK_SLOTS: usize = 4096;
/// Chunks of one table: four million slots.
const MAX_CHUNKS: usize = 1024;
/// Slabs that may exist: more than a machine has workers.
const MAX_SLABS: usize = 4096;

/// Bits of one slot.
const BITS: usize = u64::BITS as usize;

/// How many slots a table can hold.
pub(super) const MAX_SLOTS: usize = CHUNK_SLOTS * MAX_CHUNKS;

/// Aligned so that no two workers' chunks share a cache line (nor the pair that the prefetcher fetches).
#[repr(align(128))]
struct Chunk<T>([T; CHUNK_SLOTS]);

/// What is valid, and at zero, where all its bytes are zero.
///
/// # Safety
///
/// All-zero memory must be a valid value of the type.
unsafe trait Zero {}

// SAFETY: an atomic integer has the representation of the integer, for which any bytes are valid.
unsafe impl Zero for AtomicU64 {}
// SAFETY: an atomic pointer has the representation of the pointer; all zeros is the null pointer.
unsafe impl<T> Zero for AtomicPtr<T> {}

impl<T: Zero> Chunk<T> {
    /// A chunk that is never freed. Its pages are the kernel's zeros until they are written: a worker that never serves a
    /// cluster needs no memory for its statistics.
    fn leaked() -> *mut Chunk<T> {
        let layout = Layout::new::<Chunk<T>>();
        // SAFETY: the layout is not of size zero.
        let memory = unsafe { alloc::alloc_zeroed(layout) };
        if memory.is_null() {
            alloc::handle_alloc_error(layout);
        }
        memory.cast()
    }
}

/// Slots that never move, in chunks that are allocated as they are needed and never freed.
struct Table<T: Zero + 'static>(Box<[AtomicPtr<Chunk<T>>]>);

impl<T: Zero> Table<T> {
    fn new() -> Table<T> {
        Table((0..MAX_CHUNKS).map(|_| AtomicPtr::new(ptr::null_mut())).collect())
    }

    /// The slot, or `None` where its chunk was never allocated.
    #[inline]
    fn get(&self, slot: u32) -> Option<&'static T> {
        let slot = slot as usize;
        let chunk = self.0.get(slot / CHUNK_SLOTS)?.load(Ordering::Acquire);
        // SAFETY: the pointer is null or came from `Chunk::leaked` in `grow`, so it is valid for the program's life; the
        // Acquire load pairs with the Release store there, so the chunk is seen initialised.
        unsafe { chunk.as_ref() }.map(|chunk| &chunk.0[slot % CHUNK_SLOTS])
    }

    /// Makes the chunks that hold the first `slots` slots. Called with the registry locked: one caller at a time.
    fn grow(&self, slots: usize) {
        // From the end: they are made in order, and mostly none is missing.
        let missing = self.0[..slots.div_ceil(CHUNK_SLOTS).min(MAX_CHUNKS)].iter().rev();
        for chunk in missing.take_while(|chunk| chunk.load(Ordering::Relaxed).is_null()) {
            chunk.store(Chunk::leaked(), Ordering::Release);
        }
    }
}

/// The values of one thread, or of all threads that are not workers.
pub(super) struct Slab {
    values: Table<AtomicU64>,
    /// A bit for each value: it has come back to zero.
    emptied: Table<AtomicU64>,
    histograms: Table<AtomicPtr<Buckets>>,
    /// Whether a live worker writes it.
    leased: AtomicBool,
}

impl Slab {
    fn new(leased: bool) -> &'static Slab {
        Box::leak(Box::new(Slab {
            values: Table::new(),
            emptied: Table::new(),
            histograms: Table::new(),
            leased: AtomicBool::new(leased),
        }))
    }

    fn grow(&self, values: usize, histograms: usize) {
        self.values.grow(values);
        self.emptied.grow(values.div_ceil(BITS));
        self.histograms.grow(histograms);
    }

    /// Whether the slot was ever counted up or down here.
    pub(super) fn is_used(&self, slot: u32) -> bool {
        let (word, bit) = bit_of(slot);
        self.value(slot) != 0 || self.emptied.get(word).is_some_and(|word| word.load(Ordering::Relaxed) & bit != 0)
    }

    /// Notes that the slot has come back to zero: written once, and only read after that.
    fn note_emptied(&self, slot: u32) {
        let (word, bit) = bit_of(slot);
        if let Some(word) = self.emptied.get(word)
            && word.load(Ordering::Relaxed) & bit == 0
        {
            word.fetch_or(bit, Ordering::Relaxed);
        }
    }

    fn clear(&self, slot: u32) {
        let (word, bit) = bit_of(slot);
        if let Some(value) = self.values.get(slot) {
            value.store(0, Ordering::Relaxed);
        }
        if let Some(word) = self.emptied.get(word) {
            word.fetch_and(!bit, Ordering::Relaxed);
        }
    }

    /// The slot's value; 0 where it was never written.
    #[inline]
    pub(super) fn value(&self, slot: u32) -> u64 {
        self.values.get(slot).map_or(0, |value| value.load(Ordering::Relaxed))
    }

    /// What this thread recorded in a histogram; `None` where it recorded nothing.
    pub(super) fn buckets(&self, slot: u32) -> Option<&'static Buckets> {
        let buckets = self.histograms.get(slot)?.load(Ordering::Acquire);
        // SAFETY: null, or leaked by `buckets_or_new` and so valid for the program's life; Acquire pairs with its
        // Release.
        unsafe { buckets.as_ref() }
    }

    fn buckets_or_new(&self, slot: u32) -> Option<&'static Buckets> {
        if let Some(buckets) = self.buckets(slot) {
            return Some(buckets);
        }
        let new = Box::into_raw(Box::new(Buckets::default()));
        let cell = self.histograms.get(slot)?;
        match cell.compare_exchange(ptr::null_mut(), new, Ordering::AcqRel, Ordering::Acquire) {
            // SAFETY: just made by `Box::into_raw`, published, and from here on never freed.
            Ok(_) => Some(unsafe { &*new }),
            Err(winner) => {
                // SAFETY: `new` was not published, so nobody else has it; `winner` is not null (the exchange expected
                // null) and never freed.
                unsafe {
                    drop(Box::from_raw(new));
                    Some(&*winner)
                }
            }
        }
    }
}

/// Every slab there is; the first is the one that threads without a slab of their own share.
struct Slabs {
    all: Box<[AtomicPtr<Slab>]>,
    count: AtomicUsize,
    shared: &'static Slab,
}

static SLABS: LazyLock<Slabs> = LazyLock::new(|| {
    let shared = Slab::new(true);
    let all: Box<[_]> = (0..MAX_SLABS).map(|_| AtomicPtr::new(ptr::null_mut())).collect();
    all[0].store(ptr::from_ref(shared).cast_mut(), Ordering::Release);
    Slabs { all, count: AtomicUsize::new(1), shared }
});

thread_local! {
    /// This thread's own slab; `None` on threads that are not workers.
    static OWN: Cell<Option<&'static Slab>> = const { Cell::new(None) };
    /// Gives the slab back when the thread ends.
    static LEASE: RefCell<Option<Lease>> = const { RefCell::new(None) };
}

/// A worker's hold on its slab.
struct Lease(&'static Slab);

impl Drop for Lease {
    fn drop(&mut self) {
        OWN.set(None);
        self.0.leased.store(false, Ordering::Release);
    }
}

/// Which word of `Slab::emptied` a slot's bit is in, and the bit.
fn bit_of(slot: u32) -> (u32, u64) {
    (slot / u64::BITS, 1 << (slot % u64::BITS))
}

/// Every slab there is.
pub(super) fn all() -> impl Iterator<Item = &'static Slab> {
    let count = SLABS.count.load(Ordering::Acquire);
    SLABS.all[..count].iter().filter_map(|slab| {
        // SAFETY: null, or leaked by `Slab::new` and so valid for the program's life.
        unsafe { slab.load(Ordering::Acquire).as_ref() }
    })
}

/// Makes room in every slab for so many values and histograms. Called with the registry locked.
pub(super) fn grow(values: usize, histograms: usize) {
    all().for_each(|slab| slab.grow(values, histograms));
}

/// Gives the calling thread a slab with room for so many values and histograms: one that a thread which has ended left
/// behind (its values stay in it, and stay counted), else a new one. Called with the registry locked. `false` where
/// there are too many slabs: the thread then goes on sharing.
pub(super) fn lease(values: usize, histograms: usize) -> bool {
    if OWN.get().is_some() {
        return true;
    }
    let free =
        all().find(|slab| slab.leased.compare_exchange(false, true, Ordering::AcqRel, Ordering::Relaxed).is_ok());
    let slab = match free {
        Some(slab) => slab,
        None => {
            let index = SLABS.count.load(Ordering::Relaxed);
            let Some(entry) = SLABS.all.get(index) else { return false };
            let slab = Slab::new(true);
            entry.store(ptr::from_ref(slab).cast_mut(), Ordering::Release);
            SLABS.count.store(index + 1, Ordering::Release);
            slab
        }
    };
    slab.grow(values, histograms);
    OWN.set(Some(slab));
    LEASE.set(Some(Lease(slab)));
    true
}

/// Adds `delta` to this thread's share of a slot; the shares' sum wraps, so a negative number is its two's complement.
#[inline]
pub(super) fn add(slot: u32, delta: u64) {
    match OWN.get() {
        Some(slab) => {
            if let Some(value) = slab.values.get(slot) {
                // Only this thread writes it: no locked instruction is needed.
                value.store(value.load(Ordering::Relaxed).wrapping_add(delta), Ordering::Relaxed);
            }
        }
        None => add_shared(slot, delta),
    }
}

/// Adds `delta` to the share of the threads that are not workers.
#[cold]
pub(super) fn add_shared(slot: u32, delta: u64) {
    if let Some(value) = SLABS.shared.values.get(slot) {
        value.fetch_add(delta, Ordering::Relaxed);
    }
}

/// Takes `n` from this thread's share of a slot, and remembers that there was something to be taken.
#[inline]
pub(super) fn take(slot: u32, n: u64) {
    match OWN.get() {
        Some(slab) => {
            if let Some(value) = slab.values.get(slot) {
                // Only this thread writes it: no locked instruction is needed.
                let left = value.load(Ordering::Relaxed).wrapping_sub(n);
                value.store(left, Ordering::Relaxed);
                if left == 0 {
                    slab.note_emptied(slot);
                }
            }
        }
        None => take_shared(slot, n),
    }
}

#[cold]
fn take_shared(slot: u32, n: u64) {
    add_shared(slot, n.wrapping_neg());
    SLABS.shared.note_emptied(slot);
}

/// Makes every thread's share zero, as if nobody had ever written it. Nobody may be writing the slot.
pub(super) fn clear(slot: u32) {
    all().for_each(|slab| slab.clear(slot));
}

/// The sum of all threads' shares.
#[inline]
pub(super) fn sum(slot: u32) -> u64 {
    all().fold(0, |sum, slab| sum.wrapping_add(slab.value(slot)))
}

/// Records a value in this thread's share of a histogram.
#[inline]
pub(super) fn record(slot: u32, value: u64) {
    match OWN.get() {
        Some(slab) => {
            if let Some(buckets) = slab.buckets_or_new(slot) {
                buckets.record_alone(value);
            }
        }
        None => {
            if let Some(buckets) = SLABS.shared.buckets_or_new(slot) {
                buckets.record_shared(value);
            }
        }
    }
}
