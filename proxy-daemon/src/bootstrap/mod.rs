//! Flags and files -> Envoy's bootstrap message.

pub mod flags;
mod load;

pub use flags::Flags;
pub use load::{LoadError, load, validate};
