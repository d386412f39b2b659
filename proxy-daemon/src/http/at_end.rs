//! What is done when a stream is over.

use std::{cell::RefCell, fmt};

use crate::access_log::Record;

type Then = Box<dyn FnOnce(&Record<'_>)>;

/// What filters have asked for. Empty, as it is mostly, it costs nothing.
#[derive(Default)]
pub struct AtEnd(RefCell<Vec<Then>>);

impl AtEnd {
    /// Has this done, in its turn, with what access logs could tell of the stream but its messages' heads.
    pub fn add(&self, then: impl FnOnce(&Record<'_>) + 'static) {
        self.0.borrow_mut().push(Box::new(then));
    }

    pub(super) fn take(&self) -> Vec<Then> {
        self.0.take()
    }
}

impl fmt::Debug for AtEnd {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("AtEnd").field(&self.0.borrow().len()).finish()
    }
}
