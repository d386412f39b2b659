//! Futures on the heap that are not copied there.

use std::pin::Pin;

/// Puts the future that `make` returns into a box of its own.
///
/// A request's future is 10 KB, and a new one is empty but for its arguments. `Box::pin(future)` makes it on the stack, then asks for
/// memory, then copies all of it, and a task copies what it is given half a dozen times more. Asked for first, the memory is written
/// where it stays. That takes an async function that is `inline(always)`, which only concerns how its future is made: what a call gives
/// back is all of the future.
#[inline(always)]
pub(super) fn boxed<F: Future>(make: impl FnOnce() -> F) -> Pin<Box<F>> {
    let memory = Box::<F>::new_uninit();
    Box::into_pin(Box::write(memory, make()))
}
