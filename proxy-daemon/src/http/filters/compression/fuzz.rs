//! What the fuzzer `compression` feeds.

use envoy_types::pb::{envoy::config::core::v3::TypedExtensionConfig, google::protobuf::Any};

use super::{Step, compressors, decompressors};

const KINDS: [&str; 3] = ["gzip", "brotli", "zstd"];

/// So much is decompressed of one input.
const MOST: usize = 1 << 20;

/// A library with its defaults, of compressors or decompressors.
pub(super) fn library(direction: &str, kind: &str) -> TypedExtensionConfig {
    let message = match kind {
        "gzip" => "Gzip",
        "brotli" => "Brotli",
        _ => "Zstd",
    };
    let type_url = format!("type.googleapis.com/envoy.extensions.compression.{kind}.{direction}.v3.{message}");
    TypedExtensionConfig { name: "text".to_owned(), typed_config: Some(Any { type_url, value: Vec::new() }) }
}

/// A body, of which the first byte says what encoding it claims to be in and where it is parted. That makes no difference, and what is
/// compressed comes out again.
pub(in crate::http) fn fuzz(bytes: &[u8]) {
    let Some((how, body)) = bytes.split_first() else { return };
    let (kind, size) = (KINDS[usize::from(how % 3)], usize::from(how / 3) + 1);
    let whole = decompressed(kind, body, body.len().max(1));
    let parted = decompressed(kind, body, size);
    // Of what is broken more or less may come out before that is seen.
    if let (Some(whole), Some(parted)) = (whole, parted) {
        assert_eq!(whole, parted, "{kind} in pieces of {size}");
    }
    let compressed = compressed(kind, body, size);
    assert_eq!(decompressed(kind, &compressed, compressed.len().max(1)).as_deref(), Some(body), "{kind}");
}

fn compressed(kind: &str, body: &[u8], size: usize) -> Vec<u8> {
    let library = compressors(Some(&library("compressor", kind)), "").ok();
    let mut compressor = library.and_then(|library| library.codecs.compressor()).expect("the defaults are good");
    let mut out = Vec::new();
    for piece in body.chunks(size) {
        compressor.compress(piece, false, &mut out).expect("everything can be compressed");
    }
    compressor.compress(&[], true, &mut out).expect("everything can be compressed");
    out
}

/// `None`: it is broken, or becomes too long.
fn decompressed(kind: &str, body: &[u8], size: usize) -> Option<Vec<u8>> {
    let library = decompressors(Some(&library("decompressor", kind)), "").ok();
    let mut decompressor = library.and_then(|library| library.codecs.decompressor()).expect("the defaults are good");
    let mut out = Vec::new();
    for mut piece in body.chunks(size) {
        loop {
            let before = (piece.len(), out.len());
            match decompressor.step(&mut piece, &mut out) {
                Step::More => assert_ne!((piece.len(), out.len()), before, "{kind} stands still"),
                Step::Drained => break,
                Step::Broken(_) => return None,
            }
            if out.len() > MOST {
                return None;
            }
        }
    }
    Some(out)
}
