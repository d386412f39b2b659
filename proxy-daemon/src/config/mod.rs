//! Envoy's messages, checked and turned into the compact configuration that the data plane reads.
//!
//! `model` holds what the workers use and knows no protobuf; `parse` is the only code that reads Envoy's messages.
//! Every field of a message that is set and not honoured is refused with its path: see [`FieldError`].

pub mod dump;
pub mod fuzz;
pub mod model;
pub mod parse;
pub mod status;
pub mod store;

mod error;

pub use error::FieldError;
