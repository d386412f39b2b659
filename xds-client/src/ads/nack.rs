//! What a NACK says.

use envoy_types::pb::google::rpc::Status;

use super::Rejection;

/// gRPC's code INTERNAL, which Envoy puts into its NACKs.
const CODE: i32 = 13;
/// The longest text of a NACK, in bytes: some servers log every one.
const MAX_BYTES: usize = 16 * 1024;

/// The NACK's detail, naming every rejected resource as far as there is room; `None` where there is none.
pub(crate) fn detail(rejected: &[Rejection]) -> Option<Status> {
    if rejected.is_empty() {
        return None;
    }
    let mut message = String::new();
    for (index, Rejection { name, message: why }) in rejected.iter().enumerate() {
        let line = if name.is_empty() { why.clone() } else { format!("{name}: {why}") };
        if !message.is_empty() && message.len() + line.len() > MAX_BYTES {
            message.push_str(&format!("\nand {} more", rejected.len() - index));
            break;
        }
        if !message.is_empty() {
            message.push('\n');
        }
        message.push_str(&line);
    }
    Some(Status { code: CODE, message, details: Vec::new() })
}
