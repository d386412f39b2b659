//! Carries bytes between two streams: both ends of a tunnel, and the command line's proxy.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf, copy_bidirectional_with_sizes};

/// The buffer of each direction, in bytes.
const BUFFER: usize = 16 * 1024;

/// Counts what passes.
struct Counted<T> {
    inner: T,
    read: Arc<AtomicU64>,
}

impl<T: AsyncRead + Unpin> AsyncRead for Counted<T> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        let polled = Pin::new(&mut self.inner).poll_read(cx, buffer);
        self.read.fetch_add((buffer.filled().len() - before) as u64, Ordering::Relaxed);
        polled
    }
}

impl<T: AsyncWrite + Unpin> AsyncWrite for Counted<T> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.inner).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_shutdown(cx)
    }
}

/// Carries bytes in both directions until both have ended, one fails, or nothing has passed for `idle`. Gives how many came
/// from `one` and from `other`.
pub async fn relay<A, B>(one: A, other: B, idle: Duration) -> (u64, u64)
where
    A: AsyncRead + AsyncWrite + Unpin,
    B: AsyncRead + AsyncWrite + Unpin,
{
    let counts = [Arc::new(AtomicU64::new(0)), Arc::new(AtomicU64::new(0))];
    let passed = || counts.each_ref().map(|count| count.load(Ordering::Relaxed));
    let mut one = Counted { inner: one, read: Arc::clone(&counts[0]) };
    let mut other = Counted { inner: other, read: Arc::clone(&counts[1]) };
    let watch = async {
        let mut before = passed();
        loop {
            tokio::time::sleep(idle).await;
            if std::mem::replace(&mut before, passed()) == passed() {
                return;
            }
        }
    };
    tokio::select! {
        _ = copy_bidirectional_with_sizes(&mut one, &mut other, BUFFER, BUFFER) => {}
        () = watch => {}
    }
    passed().into()
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, duplex};

    use super::*;

    const LONG: Duration = Duration::from_secs(60);

    #[tokio::test]
    async fn each_direction_ends_by_itself() {
        let ((mut near, one), (other, mut far)) = (duplex(64), duplex(64));
        let relayed = tokio::spawn(relay(one, other, LONG));
        near.write_all(b"question").await.unwrap();
        near.shutdown().await.unwrap();
        let mut text = String::new();
        far.read_to_string(&mut text).await.unwrap();
        assert_eq!(text, "question");
        far.write_all(b"answer!").await.unwrap();
        drop(far);
        text.clear();
        near.read_to_string(&mut text).await.unwrap();
        assert_eq!((&*text, relayed.await.unwrap()), ("answer!", (8, 7)));
    }

    #[tokio::test(start_paused = true)]
    async fn silence_ends_it() {
        let ((mut near, one), (other, _far)) = (duplex(64), duplex(64));
        let relayed = tokio::spawn(relay(one, other, LONG));
        for _ in 0..5 {
            tokio::time::sleep(LONG / 2).await;
            near.write_all(b"x").await.unwrap();
        }
        assert_eq!(relayed.await.unwrap(), (5, 0));
        assert_eq!(near.read(&mut [0]).await.unwrap(), 0);
    }
}
