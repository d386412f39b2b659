use tokio::runtime::{Handle, RuntimeFlavor};

/// Does what may take long. The other tasks of this thread go on elsewhere meanwhile, where there are such.
pub fn aside<T>(work: impl FnOnce() -> T) -> T {
    match Handle::try_current().map(|runtime| runtime.runtime_flavor()) {
        Ok(RuntimeFlavor::MultiThread) => tokio::task::block_in_place(work),
        _ => work(),
    }
}
