//! Network (L4) filters, one file each.

pub mod tcp_proxy;

pub use tcp_proxy::TcpProxy;
