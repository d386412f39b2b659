//! Network (L4) filters, one file each.

pub mod tcp_proxy;
mod tunnel;

pub use tcp_proxy::TcpProxy;
