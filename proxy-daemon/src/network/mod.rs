//! Network (L4) filters, one file each.

mod relay;
mod sni_dynamic_forward_proxy;
pub mod tcp_proxy;
mod tunnel;

pub use tcp_proxy::TcpProxy;
