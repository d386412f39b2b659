//! `connection_keepalive`: pings, and the end of a connection whose other side answers none.

use std::{
    pin::Pin,
    task::{Context, Poll, ready},
    time::Duration,
};

use h2::{Ping, PingPong};
use tokio::time::{Instant, Sleep};

use crate::config::model::Http2Keepalive;

/// The pings of one connection.
pub(super) struct Keepalive {
    pings: PingPong,
    settings: Http2Keepalive,
    /// There is a ping that has not been answered.
    waits: bool,
    /// Until the next ping, or until its answer is overdue.
    timer: Pin<Box<Sleep>>,
}

impl Keepalive {
    /// For a connection of which `pings` are to be had; `None` where there shall be none.
    pub(super) fn new(settings: Option<Http2Keepalive>, pings: Option<PingPong>) -> Option<Keepalive> {
        let (settings, pings) = settings.zip(pings)?;
        let timer = Box::pin(tokio::time::sleep(pause(&settings)));
        Some(Keepalive { pings, settings, waits: false, timer })
    }

    /// Ready when an answer is overdue.
    pub(super) fn poll(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        loop {
            if self.waits && self.pings.poll_pong(cx).is_ready() {
                self.waits = false;
                self.timer.as_mut().reset(Instant::now() + pause(&self.settings));
            }
            ready!(self.timer.as_mut().poll(cx));
            if self.waits {
                return Poll::Ready(());
            }
            // What cannot be pinged any more ends by itself.
            self.waits = self.pings.send_ping(Ping::opaque()).is_ok();
            let next = if self.waits { self.settings.timeout } else { pause(&self.settings) };
            self.timer.as_mut().reset(Instant::now() + next);
        }
    }
}

/// How long it is to the next ping.
fn pause(settings: &Http2Keepalive) -> Duration {
    settings.interval + settings.jitter.mul_f64(fastrand::f64())
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, DuplexStream};

    use super::super::ClientConnection;
    use super::*;
    use crate::config::model::{HeadLimits, Http2Options};

    /// How long a connection to such a host lasts, if it ends at all.
    async fn lasts(host: impl AsyncFnOnce(DuplexStream)) -> Option<Duration> {
        let keepalive = Http2Keepalive {
            interval: Duration::from_secs(2),
            timeout: Duration::from_secs(1),
            jitter: Duration::ZERO,
        };
        let options = Http2Options { keepalive: Some(keepalive), ..Http2Options::default() };
        let (ours, theirs) = tokio::io::duplex(64 * 1024);
        let began = Instant::now();
        let connection = async {
            let (_client, driver) = ClientConnection::start(ours, &options, 65536, HeadLimits::default()).await.ok()?;
            driver.await.ok()?;
            Some(began.elapsed())
        };
        tokio::select! {
            lasted = connection => lasted,
            () = host(theirs) => None,
            () = tokio::time::sleep(Duration::from_secs(60)) => None,
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_host_that_answers_no_pings_is_left() {
        let silent = async |mut io: DuplexStream| {
            // SETTINGS without any.
            io.write_all(&[0, 0, 0, 4, 0, 0, 0, 0, 0]).await.unwrap();
            let mut read = Vec::new();
            io.read_to_end(&mut read).await.unwrap();
            std::future::pending().await
        };
        assert_eq!(lasts(silent).await, Some(Duration::from_secs(3)));
    }

    #[tokio::test(start_paused = true)]
    async fn a_host_that_answers_pings_is_kept() {
        let answering = async |io: DuplexStream| {
            let mut connection = h2::server::handshake(io).await.unwrap();
            while connection.accept().await.is_some() {}
            std::future::pending().await
        };
        assert_eq!(lasts(answering).await, None);
    }
}
