//! What a worker has of a cluster's hosts. See LIFECYCLE.md.

use std::{
    cell::{Cell, Ref, RefCell},
    collections::VecDeque,
    rc::Rc,
    sync::Arc,
};

use super::{Host, HostSet, WorkerHost};
use crate::config::model::PoolOptions;

/// By the hosts' slots: those that this worker has used.
type Slots = Vec<Option<Rc<WorkerHost>>>;

/// So many are moved or let go of at once; more of them little by little, so that no request waits for it.
const AT_ONCE: usize = 64;
/// So many slots are looked at for that: most may have nothing in them.
const LOOKED_AT: usize = 4096;
/// So often the hosts may change before what was before the first of these changes is done with.
const BEHIND: usize = 4;

/// The hosts of a cluster now, and a worker's part of each.
#[derive(Default)]
pub(super) struct Mine {
    options: PoolOptions,
    set: RefCell<Arc<HostSet>>,
    slots: RefCell<Slots>,
    /// How many there are in `slots`.
    used: Cell<usize>,
    /// What there was before the hosts changed, the oldest first: hosts that stay are moved when they are needed, or by and by.
    before: RefCell<VecDeque<Slots>>,
}

impl Mine {
    /// None yet, of a cluster with these options.
    pub(super) fn new(options: PoolOptions) -> Mine {
        Mine { options, ..Mine::default() }
    }

    /// The same hosts for another version of the cluster, which has none of its own yet.
    pub(super) fn of_next_version(&self, options: PoolOptions) -> Mine {
        let next = Mine::new(options);
        self.settle();
        next.slots.replace(self.slots.borrow().clone());
        next.used.set(self.used.get());
        next
    }

    /// All hosts.
    pub(super) fn set(&self) -> Ref<'_, Arc<HostSet>> {
        self.set.borrow()
    }

    /// Whether this worker's last connect to a host of the set has failed. It is asked once for each failure.
    pub(super) fn has_failed(&self, host: &Host) -> bool {
        let slots = self.slots.borrow();
        slots.get(host.slot as usize).and_then(Option::as_ref).is_some_and(|mine| mine.pool.take_failure())
    }

    /// Requests of this worker that a host of the set has.
    pub(super) fn active(&self, host: &Host) -> u32 {
        let slot = host.slot as usize;
        if let Some(mine) = &self.slots.borrow()[slot] {
            return mine.active();
        }
        let before = self.before.borrow();
        let known = before.iter().find_map(|slots| slots.get(slot)?.as_ref().filter(|known| known.is(host)));
        known.map_or(0, |known| known.active())
    }

    /// What is this worker's of a host of the set.
    pub(super) fn of(&self, host: &Arc<Host>, worker: usize) -> Rc<WorkerHost> {
        self.of_or(host, worker, || None)
    }

    /// The same; where this has nothing of the host, it may be elsewhere.
    pub(super) fn of_or(
        &self,
        host: &Arc<Host>,
        worker: usize,
        elsewhere: impl FnOnce() -> Option<Rc<WorkerHost>>,
    ) -> Rc<WorkerHost> {
        let slot = host.slot as usize;
        if let Some(mine) = &self.slots.borrow()[slot] {
            return Rc::clone(mine);
        }
        let known = self.before.borrow_mut().iter_mut().find_map(|slots| {
            let known = slots.get_mut(slot)?;
            known.take_if(|known| known.is(host))
        });
        let known = known.or_else(elsewhere);
        let mine =
            known.map_or_else(|| WorkerHost::new(Arc::clone(host), worker), |known| known.now(host, self.options));
        self.put(slot, Rc::clone(&mine));
        mine
    }

    fn put(&self, slot: usize, mine: Rc<WorkerHost>) {
        self.slots.borrow_mut()[slot] = Some(mine);
        self.used.set(self.used.get() + 1);
    }

    /// Adopts other hosts: those that stay keep their connections, those that are gone keep nothing idle.
    pub(super) fn adopt(self: &Rc<Self>, set: Arc<HostSet>) {
        let slots = self.slots.replace(vec![None; set.by_slot.len()]);
        self.set.replace(set).leave();
        let many = self.used.take() > AT_ONCE;
        let mut before = self.before.borrow_mut();
        let at_work = !before.is_empty();
        before.push_back(slots);
        drop(before);
        if !many && !at_work {
            return self.settle();
        }
        while self.before.borrow().len() > BEHIND {
            self.settle_some();
        }
        if !at_work {
            let mine = Rc::clone(self);
            tokio::task::spawn_local(async move {
                while mine.settle_some() {
                    tokio::task::yield_now().await;
                }
            });
        }
    }

    /// Goes through all that was before.
    fn settle(&self) {
        while self.settle_some() {}
    }

    /// Goes through some of what was before, from its end; `false`: there is nothing left of it.
    fn settle_some(&self) -> bool {
        let (mut looked_at, mut done) = (0, 0);
        while looked_at < LOOKED_AT && done < AT_ONCE {
            let mut before = self.before.borrow_mut();
            let Some(oldest) = before.front_mut() else { return false };
            let Some(last) = oldest.pop() else {
                before.pop_front();
                continue;
            };
            let slot = oldest.len();
            drop(before);
            looked_at += 1;
            let Some(known) = last else { continue };
            done += 1;
            let set = self.set.borrow();
            match set.in_slot(slot).filter(|host| known.is(host)) {
                Some(host) => self.put(slot, known.now(host, self.options)),
                None => known.retire(),
            }
        }
        !self.before.borrow().is_empty()
    }

    /// Keeps nothing idle of any host.
    pub(super) fn retire(&self) {
        let mut all: Slots = self.slots.borrow().clone();
        all.extend(self.before.borrow().iter().flatten().cloned());
        all.retain(Option::is_some);
        if all.len() <= AT_ONCE {
            all.iter().flatten().for_each(|host| host.retire());
            return;
        }
        tokio::task::spawn_local(async move {
            for some in all.chunks(AT_ONCE) {
                some.iter().flatten().for_each(|host| host.retire());
                tokio::task::yield_now().await;
            }
        });
    }

    #[cfg(test)]
    pub(super) fn settles(&self) -> bool {
        !self.before.borrow().is_empty()
    }

    /// Without the hosts themselves.
    #[cfg(test)]
    pub(super) fn bytes(&self) -> usize {
        let before: usize = self.before.borrow().iter().map(Vec::capacity).sum();
        (self.slots.borrow().capacity() + before) * size_of::<Option<Rc<WorkerHost>>>()
    }
}
