//! Checks by bytes, or by a connection alone.

use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::{Failure, Outcome, Passed, Target, contains};
use crate::{
    config::model::TcpCheck,
    tls::AlpnFallback,
    upstream::{
        UpstreamStream,
        connect::{connect_plain, secure},
    },
};

/// The most that a host may send before what is waited for has come.
const MAX_ANSWER: usize = 64 * 1024;

pub(super) struct TcpProbe {
    target: Target,
    reuse: bool,
    connection: Option<UpstreamStream>,
}

impl TcpProbe {
    pub(super) fn new(target: Target, reuse: bool) -> TcpProbe {
        TcpProbe { target, reuse, connection: None }
    }

    pub(super) async fn probe(&mut self, check: &TcpCheck) -> Outcome {
        let kept = self.connection.take().filter(is_open);
        match self.attempt(kept, check).await {
            Ok(connection) => {
                // Without an answer that the connection is kept for, it is not.
                self.connection = Some(connection).filter(|_| self.reuse && !check.receive.is_empty());
                Outcome { result: Ok(Passed::default()), http_status: None }
            }
            Err(failure) => failure.into(),
        }
    }

    async fn attempt(&self, kept: Option<UpstreamStream>, check: &TcpCheck) -> Result<UpstreamStream, Failure> {
        let mut connection = match kept {
            Some(connection) => connection,
            None => open(&self.target, AlpnFallback::None).await?,
        };
        connection.write_all(&check.send).await.map_err(|_| Failure::Network)?;
        let mut answer = Vec::new();
        while !contains(&answer, &check.receive) {
            if answer.len() >= MAX_ANSWER {
                return Err(Failure::Network);
            }
            if connection.read_buf(&mut answer).await.map_err(|_| Failure::Network)? == 0 {
                return Err(Failure::Network);
            }
        }
        Ok(connection)
    }
}

/// Connects; the limit is that of the whole check.
pub(super) async fn open(target: &Target, alpn: AlpnFallback) -> Result<UpstreamStream, Failure> {
    let way = target.place.now();
    way.chosen.inspect(|counter| counter.inc());
    let stream = connect_plain(&way.address, target.socket()).await.map_err(|_| Failure::Network)?;
    let Some(tls) = &way.tls else { return Ok(stream) };
    secure(tls, stream, (&way.address, &target.name), (alpn, None)).await.map_err(|_| Failure::Network)
}

/// Whether the host has neither closed the connection since the last check nor sent what nobody waits for.
pub(super) fn is_open(connection: &UpstreamStream) -> bool {
    let mut byte = [0];
    let read = match connection {
        UpstreamStream::Tcp(stream) => stream.try_read(&mut byte),
        UpstreamStream::Unix(stream) => stream.try_read(&mut byte),
        // Nobody knows what is still to come on it.
        UpstreamStream::Tls(_) => return false,
    };
    read.is_err_and(|error| error.kind() == std::io::ErrorKind::WouldBlock)
}
