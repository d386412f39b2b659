//! Tasks that last as long as the process.

use std::future::pending;

use tokio::{runtime::Handle, task::JoinSet};

/// Tasks of which none may end before the process does: what it does would silently not be done any more. Dropped, they go on.
#[derive(Debug, Default)]
pub struct Tasks(JoinSet<&'static str>);

impl Tasks {
    /// Starts one. `what` it does is for the log. Must be called within a runtime.
    pub fn spawn<T>(&mut self, what: &'static str, task: impl Future<Output = T> + Send + 'static) {
        self.spawn_on(what, task, &Handle::current());
    }

    /// The same on another runtime.
    pub fn spawn_on<T>(&mut self, what: &'static str, task: impl Future<Output = T> + Send + 'static, on: &Handle) {
        let task = async move {
            drop(task.await);
            what
        };
        self.0.spawn_on(task, on);
    }

    /// Waits until one has ended, and says which, or of what it panicked. Cancelling this loses nothing.
    pub async fn ended(&mut self) -> String {
        match self.0.join_next().await {
            Some(Ok(what)) => format!("the task that {what} has ended"),
            Some(Err(error)) => format!("a task that must not end has failed: {error}"),
            None => pending().await,
        }
    }
}

impl Drop for Tasks {
    fn drop(&mut self) {
        self.0.detach_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_end_of_a_task_and_its_panic_are_told() {
        let mut tasks = Tasks::default();
        tasks.spawn("waits", pending::<()>());
        tasks.spawn("returns", async {});
        assert_eq!(tasks.ended().await, "the task that returns has ended");
        tasks.spawn("panics", async { panic!("of this") });
        let told = tasks.ended().await;
        assert!(told.contains("of this"), "{told}");
    }
}
