//! Connections through the daemon, which the test itself plays.

use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpListener};

use super::{Lab, Namespace, Stream, accept, connect_as};

/// Some words in both directions.
pub fn talk(one: &mut Stream, other: &mut Stream) {
    for _ in 0..2 {
        one.write_all(b"hello").expect("write");
        let mut word = [0; 5];
        other.read_exact(&mut word).expect("read");
        other.write_all(&word).expect("write");
        one.read_exact(&mut word).expect("read");
        assert_eq!(&word, b"hello");
    }
}

/// An address without its IPv4-mapped form.
pub fn canonical(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip().to_canonical(), address.port())
}

/// An address in the form that a dual-stack program uses for IPv4.
pub fn mapped(address: &str) -> String {
    let address: SocketAddr = address.parse().unwrap();
    match address {
        SocketAddr::V4(v4) => format!("[::ffff:{}]:{}", v4.ip(), v4.port()),
        SocketAddr::V6(_) => address.to_string(),
    }
}

/// A connection through the daemon, as it relays one: from `client`'s end to the program in the pod.
pub fn relayed(lab: &Lab, client: &Namespace, to: &str, worker: &TcpListener, app: &TcpListener) {
    let mut client = client.connect(to).unwrap_or_else(|error| panic!("{to}: {error}"));
    let source = canonical(client.local_addr().unwrap());
    let (mut accepted, peer) = accept(worker);
    let destination: SocketAddr = to.parse().unwrap();
    assert_eq!(canonical(accepted.local_addr().unwrap()), canonical(destination), "the destination is kept");
    assert_eq!(canonical(peer), source, "the source is kept");
    let from = SocketAddr::new(source.ip(), 0).to_string();
    let onward = canonical(destination).to_string();
    let mut upstream = lab.node.run(|| connect_as(&from, &onward)).expect("connects in the client's name");
    let (mut served, peer) = accept(app);
    assert_eq!(canonical(peer).ip(), source.ip(), "the pod sees the client");
    talk(&mut client, &mut accepted);
    talk(&mut upstream, &mut served);
}
