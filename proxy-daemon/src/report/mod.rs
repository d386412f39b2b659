//! What control planes are told: load (LRS). docs/xds.md says what is reported when.

mod load;
mod load_stream;

pub use load::LoadReporter;
pub use load_stream::report_load;
