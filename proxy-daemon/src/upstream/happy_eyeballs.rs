//! Hosts with several addresses: who answers first has the connection (RFC 8305).

use std::{io, net::SocketAddr, time::Duration};

use futures_util::{StreamExt as _, stream::FuturesUnordered};
use tokio::time::sleep;

use crate::config::model::HappyEyeballs;

/// The next address is tried when the one before has not answered for so long (RFC 8305, 5), as in Envoy.
const DELAY: Duration = Duration::from_millis(300);

/// The order in which addresses are tried: the families take turns (RFC 8305, 4).
pub(super) fn order(first: SocketAddr, others: &[SocketAddr], config: HappyEyeballs) -> Vec<SocketAddr> {
    let all = || std::iter::once(first).chain(others.iter().copied());
    let v6 = config.first_is_v6.filter(|v6| all().any(|address| address.is_ipv6() == *v6));
    let v6 = v6.unwrap_or(first.is_ipv6());
    let mut of_first = all().filter(|address| address.is_ipv6() == v6).peekable();
    let mut of_other = all().filter(|address| address.is_ipv6() != v6);
    let mut ordered = Vec::with_capacity(others.len() + 1);
    while of_first.peek().is_some() {
        ordered.extend(of_first.by_ref().take(config.first_count as usize));
        ordered.extend(of_other.next());
    }
    ordered.extend(of_other);
    ordered
}

/// Tries one address after the other; the next at once where one fails, and in any case after a while.
///
/// # Errors
/// That of the last failure, where all have failed.
pub(super) async fn race<T, E: From<io::Error>, F: Future<Output = Result<T, E>>>(
    addresses: impl IntoIterator<Item = SocketAddr>,
    connect: impl Fn(SocketAddr) -> F,
) -> Result<T, E> {
    let mut waiting = addresses.into_iter();
    let mut trying = FuturesUnordered::new();
    let mut last = E::from(io::ErrorKind::AddrNotAvailable.into());
    loop {
        let more = match waiting.next() {
            Some(address) => {
                trying.push(connect(address));
                true
            }
            None => false,
        };
        tokio::select! {
            biased;
            ended = trying.next() => match ended {
                Some(Ok(connected)) => return Ok(connected),
                Some(Err(error)) => last = error,
                None => return Err(last),
            },
            () = sleep(DELAY), if more => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{cell::RefCell, future::pending};

    use tokio::time::Instant;

    use super::*;

    fn addresses(hosts: &[&str]) -> Vec<SocketAddr> {
        hosts.iter().map(|host| SocketAddr::new(host.parse().unwrap(), 80)).collect()
    }

    #[test]
    fn families_take_turns() {
        let ordered = |hosts: &[&str], first_is_v6, first_count| {
            let all = addresses(hosts);
            let config = HappyEyeballs { first_is_v6, first_count };
            let ordered = order(all[0], &all[1..], config);
            ordered.iter().map(|address| address.ip().to_string()).collect::<Vec<_>>()
        };
        assert_eq!(ordered(&["::1", "::2", "1.1.1.1", "::3"], None, 1), ["::1", "1.1.1.1", "::2", "::3"]);
        assert_eq!(ordered(&["1.1.1.1", "1.1.1.2", "::1"], None, 1), ["1.1.1.1", "::1", "1.1.1.2"]);
        assert_eq!(ordered(&["1.1.1.1", "1.1.1.2", "::1"], Some(true), 1), ["::1", "1.1.1.1", "1.1.1.2"]);
        assert_eq!(ordered(&["1.1.1.1", "1.1.1.2", "::1"], None, 2), ["1.1.1.1", "1.1.1.2", "::1"]);
        assert_eq!(ordered(&["1.1.1.1", "1.1.1.2"], Some(true), 1), ["1.1.1.1", "1.1.1.2"]);
    }

    #[tokio::test(start_paused = true)]
    async fn the_next_is_tried_when_one_is_silent_or_fails() {
        let tried = RefCell::new(Vec::new());
        let began = Instant::now();
        let all = addresses(&["1.1.1.1", "1.1.1.2", "1.1.1.3", "1.1.1.4"]);
        let connected = race(all, |address| {
            tried.borrow_mut().push((address.ip().to_string(), began.elapsed().as_millis()));
            async move {
                match address.ip().to_string().as_str() {
                    "1.1.1.1" => pending().await,
                    "1.1.1.2" => Err(io::Error::from(io::ErrorKind::ConnectionRefused)),
                    _ => Ok(address),
                }
            }
        });
        assert_eq!(connected.await.unwrap(), addresses(&["1.1.1.3"])[0]);
        let expected = [("1.1.1.1", 0), ("1.1.1.2", 300), ("1.1.1.3", 300)];
        assert_eq!(*tried.borrow(), expected.map(|(ip, at)| (ip.to_owned(), at)));
    }

    #[tokio::test(start_paused = true)]
    async fn the_last_failure_is_told() {
        let failed = race(addresses(&["1.1.1.1", "1.1.1.2"]), |address| async move {
            Err::<(), _>(io::Error::other(address.to_string()))
        });
        assert_eq!(failed.await.unwrap_err().to_string(), "1.1.1.2:80");
        assert!(race([], async |_| Ok::<_, io::Error>(())).await.is_err());
    }
}
