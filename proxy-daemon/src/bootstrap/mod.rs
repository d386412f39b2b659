//! Flags and files -> Envoy's bootstrap message.

pub mod flags;
mod load;
mod resources;

pub use flags::Flags;
pub use load::{LoadError, load, validate};
