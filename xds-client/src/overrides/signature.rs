//! Messages that somebody vouches for: HMAC-SHA256 over the message's own bytes, so that nothing depends on how they are written
//! anew.

use aws_lc_rs::hmac::{self, HMAC_SHA256};
use prost::Message as _;

use super::{ContextError, Overrides, Signed, VERSION, is_revision};

/// The shortest key, in bytes.
pub const MIN_KEY_BYTES: usize = 32;
/// What keeps a signature from meaning something elsewhere.
const DOMAIN: &[u8] = b"culvert.overrides.v1";

/// The key that a file or a secret has: its bytes without one line end, which tools like to add.
#[must_use]
pub fn key_of_file(content: &[u8]) -> &[u8] {
    let content = content.strip_suffix(b"\n").unwrap_or(content);
    content.strip_suffix(b"\r").unwrap_or(content)
}

impl Overrides {
    /// The same message with a signature. Only what expires can have one.
    ///
    /// # Errors
    /// The message may not be signed, or the id or the key is none.
    pub fn sign(&self, key_id: &str, key: &[u8]) -> Result<Overrides, ContextError> {
        self.check()?;
        if self.signed.is_some() {
            return Err(ContextError::BadSigned("is signed already"));
        }
        if self.expires == 0 {
            return Err(ContextError::BadSigned("does not expire"));
        }
        if key.len() < MIN_KEY_BYTES {
            return Err(ContextError::BadSigned("needs a key of at least 32 bytes"));
        }
        let payload = self.encode_to_vec();
        let tag = hmac::sign(&hmac::Key::new(HMAC_SHA256, key), &told(key_id, &payload));
        let signed = Signed { key_id: key_id.to_owned(), payload, signature: tag.as_ref().to_vec() };
        signed.check()?;
        Ok(Overrides { version: VERSION, signed: Some(signed), ..Overrides::default() })
    }
}

impl Signed {
    /// Whether the signature is of this key.
    #[must_use]
    pub fn is_of(&self, key: &[u8]) -> bool {
        let key = hmac::Key::new(HMAC_SHA256, key);
        hmac::verify(&key, &told(&self.key_id, &self.payload), &self.signature).is_ok()
    }

    /// The message that is signed. Nothing says whether the signature is good.
    ///
    /// # Errors
    /// The message is not what it has to be, is itself signed, or does not expire.
    pub fn message(&self) -> Result<Overrides, ContextError> {
        let message = Overrides::from_bytes("the signed message", &self.payload)?;
        if message.signed.is_some() {
            return Err(ContextError::BadSigned("is signed twice"));
        }
        if message.expires == 0 {
            return Err(ContextError::BadSigned("does not expire"));
        }
        Ok(message)
    }

    pub(super) fn check(&self) -> Result<(), ContextError> {
        // What ids are made of has no line feed: the signed bytes can be taken apart in one way only.
        if !is_revision(&self.key_id) {
            return Err(ContextError::BadSigned("has a key id that is not 1 to 63 of A-Za-z0-9-_."));
        }
        if self.signature.len() != 32 {
            return Err(ContextError::BadSigned("has a signature that is not 32 bytes long"));
        }
        Ok(())
    }
}

/// The bytes that are signed.
fn told(key_id: &str, payload: &[u8]) -> Vec<u8> {
    [DOMAIN, b"\n", key_id.as_bytes(), b"\n", payload].concat()
}
