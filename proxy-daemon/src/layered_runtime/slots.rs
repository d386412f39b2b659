//! Keys that the configuration refers to, and the values that they have now.
//!
//! A key becomes a slot when configuration is read; on the request path a handle is a pointer to the slot, and reading is
//! a load. A key that nobody refers to has no slot.

use std::{
    collections::HashMap,
    fmt,
    sync::{
        Arc, LazyLock, Mutex, MutexGuard, PoisonError, Weak,
        atomic::{AtomicU64, Ordering},
    },
};

use super::{Denominator, Entry, Fraction};

/// Stands for "no such value".
const NONE: u64 = u64::MAX;

/// What a key is now, for each type that it may be asked for.
struct Slot {
    name: Box<str>,
    integer: AtomicU64,
    /// The numerator, and above its 32 bits the denominator's number.
    fraction: AtomicU64,
    /// 0 or 1.
    boolean: AtomicU64,
    /// The bits of a number, of which `NONE` is none.
    double: AtomicU64,
}

impl Slot {
    fn set(&self, entry: Option<&Entry>) {
        let boolean = entry.and_then(|entry| entry.boolean);
        self.boolean.store(boolean.map_or(NONE, u64::from), Ordering::Relaxed);
        let double = entry.and_then(|entry| entry.double).filter(|value| value.is_finite());
        self.double.store(double.map_or(NONE, f64::to_bits), Ordering::Relaxed);
        let integer = entry.and_then(|entry| entry.integer);
        self.integer.store(integer.map_or(NONE, |value| value.min(NONE - 1)), Ordering::Relaxed);
        // A whole number is a percentage.
        let whole = integer.map(|value| Fraction::percent(u32::try_from(value).unwrap_or(u32::MAX)));
        let fraction = entry.and_then(|entry| entry.fraction).or(whole);
        self.fraction.store(fraction.map_or(NONE, pack), Ordering::Relaxed);
    }
}

fn pack(fraction: Fraction) -> u64 {
    u64::from(fraction.numerator) | (fraction.denominator as u64) << 32
}

fn unpack(packed: u64) -> Fraction {
    let denominator = match packed >> 32 {
        0 => Denominator::Hundred,
        1 => Denominator::TenThousand,
        _ => Denominator::Million,
    };
    // The lower half.
    Fraction { numerator: packed as u32, denominator }
}

/// A key that configuration refers to. Cheap to clone.
#[derive(Clone)]
pub struct Key(Arc<Slot>);

impl Key {
    /// The key of this name, with the value that it has now and whatever it will have.
    pub fn new(name: &str) -> Key {
        let mut state = lock();
        if let Some(slot) = state.slots.get(name).and_then(Weak::upgrade) {
            return Key(slot);
        }
        if state.slots.len() >= state.sweep_at {
            state.slots.retain(|_, slot| slot.strong_count() > 0);
            state.sweep_at = (state.slots.len() * 2).max(1024);
        }
        let none = || AtomicU64::new(NONE);
        let slot = Slot { name: name.into(), integer: none(), fraction: none(), boolean: none(), double: none() };
        slot.set(state.values.get(name));
        let slot = Arc::new(slot);
        state.slots.insert(name.into(), Arc::downgrade(&slot));
        Key(slot)
    }

    /// `None` for the empty name, which stands for no key.
    pub fn optional(name: &str) -> Option<Key> {
        (!name.is_empty()).then(|| Key::new(name))
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.0.name
    }

    /// Its value where it is a whole number.
    #[inline]
    pub fn integer(&self) -> Option<u64> {
        Some(self.0.integer.load(Ordering::Relaxed)).filter(|value| *value != NONE)
    }

    /// Its value where it is a share: a `FractionalPercent`, or a whole number of percent.
    #[inline]
    pub fn fraction(&self) -> Option<Fraction> {
        Some(self.0.fraction.load(Ordering::Relaxed)).filter(|value| *value != NONE).map(unpack)
    }

    /// Its value where it is a number.
    #[inline]
    pub fn double(&self) -> Option<f64> {
        Some(self.0.double.load(Ordering::Relaxed)).filter(|value| *value != NONE).map(f64::from_bits)
    }

    /// Its value where it is a truth value, or a whole number: 0 is false.
    #[inline]
    pub fn boolean(&self) -> Option<bool> {
        Some(self.0.boolean.load(Ordering::Relaxed)).filter(|value| *value != NONE).map(|value| value != 0)
    }
}

impl fmt::Debug for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Key").field(&self.0.name).finish()
    }
}

impl PartialEq for Key {
    fn eq(&self, other: &Key) -> bool {
        self.0.name == other.0.name
    }
}

impl Eq for Key {}

/// `RuntimeFractionalPercent`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RuntimeFraction {
    /// Where the key has no value.
    pub default: Fraction,
    /// `runtime_key`
    pub key: Option<Key>,
}

impl RuntimeFraction {
    /// Whether this random number is among the chosen ones now.
    #[inline]
    pub fn includes(&self, random: u64) -> bool {
        self.key.as_ref().and_then(Key::fraction).unwrap_or(self.default).includes(random)
    }
}

/// `RuntimeUInt32`, or another whole number that a key may replace.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RuntimeInteger {
    /// Where the key has no value.
    pub default: u64,
    /// `runtime_key`
    pub key: Option<Key>,
}

impl RuntimeInteger {
    /// Its value now.
    #[inline]
    pub fn get(&self) -> u64 {
        self.key.as_ref().and_then(Key::integer).unwrap_or(self.default)
    }
}

/// All values that are in force.
pub(crate) type Values = HashMap<String, Entry>;

/// Told of the values before and after a change. `false`: not to be told again.
type Observer = Box<dyn Fn(&Values, &Values) -> bool + Send>;

struct State {
    values: Arc<Values>,
    slots: HashMap<Box<str>, Weak<Slot>>,
    /// How many slots there may be before those that nobody uses are looked for.
    sweep_at: usize,
    observers: Vec<Observer>,
}

static STATE: LazyLock<Mutex<State>> = LazyLock::new(|| {
    let state = State { values: Arc::default(), slots: HashMap::new(), sweep_at: 1024, observers: Vec::new() };
    Mutex::new(state)
});

fn lock() -> MutexGuard<'static, State> {
    // A panic leaves slots that have the value before: the next change sets them.
    STATE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Puts values in force. When this returns, every reader sees them.
pub(super) fn publish(values: Values) {
    let mut state = lock();
    let values = Arc::new(values);
    let before = std::mem::replace(&mut state.values, Arc::clone(&values));
    for slot in state.slots.values().filter_map(Weak::upgrade) {
        slot.set(values.get(&*slot.name));
    }
    let mut observers = std::mem::take(&mut state.observers);
    // They may look values up.
    drop(state);
    observers.retain(|observer| observer(&before, &values));
    lock().observers.append(&mut observers);
}

/// Gives `read` all values: for keys that are too many to have a slot each.
pub(crate) fn with_values<T>(read: impl FnOnce(&Values) -> T) -> T {
    let values = Arc::clone(&lock().values);
    read(&values)
}

/// Calls `observer` with the values before and after each change, as long as it returns `true`.
pub(crate) fn observe(observer: impl Fn(&Values, &Values) -> bool + Send + 'static) {
    lock().observers.push(Box::new(observer));
}

/// `RuntimeFeatureFlag`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RuntimeFlag {
    /// Where the key has no value.
    pub default: bool,
    /// `runtime_key`
    pub key: Option<Key>,
}

impl RuntimeFlag {
    /// Its value now.
    #[inline]
    pub fn get(&self) -> bool {
        self.key.as_ref().and_then(Key::boolean).unwrap_or(self.default)
    }
}

/// `RuntimeDouble`.
#[derive(Debug, Clone, PartialEq)]
pub struct RuntimeNumber {
    /// Where the key has no value.
    pub default: f64,
    /// `runtime_key`
    pub key: Option<Key>,
}

impl RuntimeNumber {
    /// Its value now.
    #[inline]
    pub fn get(&self) -> f64 {
        self.key.as_ref().and_then(Key::double).unwrap_or(self.default)
    }
}
