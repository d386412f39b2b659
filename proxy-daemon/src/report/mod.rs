//! What control planes are told: load (LRS). docs/xds.md says what is reported when.

mod load;

pub use load::LoadReporter;
