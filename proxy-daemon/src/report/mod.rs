//! What control planes are told: load (LRS) and the health of hosts (HDS). docs/xds.md says what is reported when.

mod contexts;
mod health;
mod health_stream;
mod load;
mod load_stream;

use culvert_xds_client::grpc::DialError;

pub use health::HealthReporter;
pub use health_stream::report_health;
pub use load::LoadReporter;
pub use load_stream::report_load;

/// Why a stream ended.
#[derive(Debug, thiserror::Error)]
enum Ended {
    #[error(transparent)]
    Dial(#[from] DialError),
    #[error("the server ended the stream: {:?}: {}", .0.code(), .0.message())]
    Status(Box<tonic::Status>),
    #[error("the server closed the stream")]
    Closed,
}

impl From<tonic::Status> for Ended {
    fn from(status: tonic::Status) -> Self {
        Ended::Status(Box::new(status))
    }
}
