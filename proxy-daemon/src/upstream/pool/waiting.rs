//! Requests that wait for a connection, the oldest first.

use std::{
    cell::{Cell, RefCell},
    collections::VecDeque,
    rc::Rc,
    time::Instant,
};

use tokio::sync::oneshot::{Receiver, Sender as Hand, channel, error::TryRecvError};

use super::{Pool, PoolError, Ready, SourcePool, lent::Sender, opened::Http1Connection};

type Handed = Result<Ready, PoolError>;

/// Requests without a connection.
#[derive(Default)]
pub(super) struct Waiting {
    /// With some that nobody is behind any more.
    hands: RefCell<VecDeque<Hand<Handed>>>,
    /// Those that there is somebody behind.
    count: Cell<usize>,
}

impl Waiting {
    /// How many wait.
    pub(super) fn count(&self) -> usize {
        self.count.get()
    }

    fn push(&self, hand: Hand<Handed>) {
        let mut hands = self.hands.borrow_mut();
        // Those that have left are not looked for one by one.
        if hands.len() > 2 * self.count.get() + 16 {
            hands.retain(|hand| !hand.is_closed());
        }
        hands.push_back(hand);
        self.count.set(self.count.get() + 1);
    }

    /// The one that has waited longest.
    fn pop(&self) -> Option<Hand<Handed>> {
        loop {
            let hand = self.hands.borrow_mut().pop_front()?;
            if !hand.is_closed() {
                self.count.set(self.count.get() - 1);
                return Some(hand);
            }
        }
    }
}

/// A request that waits. It may be dropped at any time.
pub(super) struct Waiter {
    pool: Rc<SourcePool>,
    host: Rc<Pool>,
    age: u32,
    receiver: Receiver<Handed>,
}

impl Waiter {
    /// What it is handed.
    pub(super) async fn handed(&mut self) -> Handed {
        // The pool, which is held here, forgets nobody.
        (&mut self.receiver).await.unwrap_or(Err(PoolError::Overflow))
    }
}

impl Drop for Waiter {
    fn drop(&mut self) {
        match self.receiver.try_recv() {
            // It was handed one, and has not looked since: the next one has it.
            Ok(Ok(Ready { sender: Sender::Http1(connection), reused })) if self.host.keeps(self.age) => {
                self.pool.hand_on(connection, reused);
            }
            Err(TryRecvError::Empty) => {
                let count = &self.pool.waiting.count;
                count.set(count.get() - 1);
                self.receiver.close();
            }
            // A stream that is dropped leaves room for the next one.
            Ok(_) | Err(TryRecvError::Closed) => {}
        }
        self.pool.settle();
    }
}

impl SourcePool {
    /// One more request waits.
    pub(super) fn join(self: &Rc<Self>, host: &Rc<Pool>) -> Waiter {
        let (hand, receiver) = channel();
        self.waiting.push(hand);
        Waiter { pool: Rc::clone(self), host: Rc::clone(host), age: host.age.get(), receiver }
    }

    /// Hands what has room to those that wait.
    pub(super) fn hand_out(self: &Rc<Self>) {
        while self.waiting.count() > 0 {
            let Some(ready) = self.take_ready() else { return };
            if let Some(hand) = self.waiting.pop() {
                // Somebody is behind it.
                let _ = hand.send(Ok(ready));
            }
        }
    }

    /// Hands a connection that is in use by nobody to the oldest request that waits; without one it becomes idle.
    pub(super) fn hand_on(self: &Rc<Self>, connection: Rc<Http1Connection>, reused: bool) {
        if let Some(hand) = self.waiting.pop() {
            let _ = hand.send(Ok(Ready { sender: Sender::Http1(connection), reused }));
        } else if connection.keeps && !self.is_over.get() && connection.client.park() {
            connection.idle_since.set(Some(Instant::now()));
            self.idle.borrow_mut().push(connection);
            self.rest();
        }
    }

    /// A connect has failed: all that wait fail, as by Envoy, and may try another host.
    pub(super) fn fail(&self, error: &PoolError) {
        // Not those that come to wait because of that.
        for _ in 0..self.waiting.count() {
            if let Some(hand) = self.waiting.pop() {
                let _ = hand.send(Err(error.clone()));
            }
        }
    }
}
