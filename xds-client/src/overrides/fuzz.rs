//! What must hold of whatever comes in headers.

use http::{HeaderMap, HeaderValue};

use super::{CARRIERS, Overrides, find, overrides_from_headers, set_sampled, strip};

/// For the fuzz target `overrides`: the first byte says which header the rest is the value of, and in which one it is once more.
///
/// # Panics
/// What must hold does not.
#[doc(hidden)]
pub fn fuzz(bytes: &[u8]) {
    let Some((first, value)) = bytes.split_first() else { return };
    let Ok(value) = HeaderValue::from_bytes(value) else { return };
    let mut headers = HeaderMap::new();
    headers.append(&CARRIERS[usize::from(*first) % CARRIERS.len()], value.clone());
    if *first >= 128 {
        headers.append(&CARRIERS[usize::from(*first / 8) % CARRIERS.len()], value);
    }
    if let Some(Ok(message)) = overrides_from_headers(&headers) {
        assert_eq!(Overrides::from_baggage_item(&message.to_baggage_item()).as_ref(), Ok(&message));
        if let Some(signed) = &message.signed {
            let _ = signed.message();
            assert!(!signed.is_of(&[7; 32]), "nobody has signed with this key");
        }
        for entry in &message.overrides {
            assert!(entry.actions().next().is_some(), "{entry:?}");
            assert!(HeaderValue::try_from(entry.config_header()).is_ok(), "{entry:?}");
        }
    }
    set_sampled(&mut headers, first.is_multiple_of(2));
    strip(&mut headers);
    assert!(find(&headers, usize::MAX).is_none(), "{headers:?}");
}
