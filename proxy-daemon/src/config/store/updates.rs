//! Updates that have not been answered yet, because something of them has not taken effect.

use std::collections::BTreeMap;

use culvert_xds_client::ads::{Done, Outcome, Rejection};

/// Names an update.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct UpdateId(u64);

struct Open {
    done: Done,
    rejected: Vec<Rejection>,
    /// What has not taken effect yet; the update itself counts as one while it is being taken.
    waiting: usize,
}

/// All updates that are to be answered.
#[derive(Default)]
pub(super) struct Updates {
    open: BTreeMap<UpdateId, Open>,
    next: u64,
    /// To be answered as soon as the lock is released.
    finished: Vec<(Done, Outcome)>,
}

impl Updates {
    /// An update is being taken; [`part_done`](Self::part_done) must follow.
    pub(super) fn begin(&mut self, done: Done) -> UpdateId {
        self.next += 1;
        let id = UpdateId(self.next);
        self.open.insert(id, Open { done, rejected: Vec::new(), waiting: 1 });
        id
    }

    /// A part of the update takes effect later.
    pub(super) fn wait(&mut self, id: UpdateId) {
        if let Some(open) = self.open.get_mut(&id) {
            open.waiting += 1;
        }
    }

    /// A part of the update is not taken. It counts as waiting until [`part_done`](Self::part_done).
    pub(super) fn reject(&mut self, id: UpdateId, name: &str, message: String) {
        if let Some(open) = self.open.get_mut(&id) {
            open.rejected.push(Rejection { name: name.to_owned(), message });
        }
    }

    /// A part of the update has taken effect, was not taken, or has been replaced by a later update.
    pub(super) fn part_done(&mut self, id: UpdateId) {
        let Some(open) = self.open.get_mut(&id) else { return };
        open.waiting -= 1;
        if open.waiting == 0
            && let Some(Open { done, rejected, .. }) = self.open.remove(&id)
        {
            self.finished.push((done, Outcome { rejected }));
        }
    }

    /// Updates to be answered now.
    pub(super) fn finished(&mut self) -> Vec<(Done, Outcome)> {
        std::mem::take(&mut self.finished)
    }
}
