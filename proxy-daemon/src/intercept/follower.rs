//! The thread that follows the pods of the node, wherever they are told.

use std::io;
use std::thread::JoinHandle;

use tokio::sync::oneshot;

/// The thread. Dropping it stops it.
pub(super) struct Follower {
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Follower {
    /// Starts the thread, which does this work until it is dropped.
    pub(super) fn start<W: Future<Output = ()>>(work: impl FnOnce() -> W + Send + 'static) -> io::Result<Self> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let (stop, stopped) = oneshot::channel();
        let thread = std::thread::Builder::new().name("intercept-pods".to_owned()).spawn(move || {
            runtime.block_on(async {
                tokio::select! {
                    () = work() => {}
                    _ = stopped => {}
                }
            });
        })?;
        Ok(Self { stop: Some(stop), thread: Some(thread) })
    }
}

impl Drop for Follower {
    fn drop(&mut self) {
        if let Some(stop) = self.stop.take() {
            // Fails only when the thread is gone.
            let _ = stop.send(());
        }
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the thread that followed the pods had panicked");
        }
    }
}
