//! The compression libraries of `envoy.filters.http.compressor` and `envoy.filters.http.decompressor`: gzip, brotli and zstd.

mod brotli;
mod fuzz;
mod gzip;
mod zstd;

use std::fmt::Debug;

pub(in crate::http) use fuzz::fuzz;

use envoy_types::pb::{envoy::config::core::v3::TypedExtensionConfig, google::protobuf::Any};
use http::HeaderValue;

use crate::config::{FieldError, parse::type_name};

/// Envoy's `chunk_size` where none is configured.
const DEFAULT_CHUNK: usize = 4096;

/// How many times longer what is decompressed may be than what it was made of, where nothing else is configured.
const MAX_RATIO: u64 = 100;

/// A compressor's or decompressor's library, as configured.
#[derive(Debug)]
pub(super) struct Library<C: ?Sized> {
    /// The extension's name: part of the names of stats.
    pub(super) name: String,
    /// `gzip`, `brotli` or `zstd`: part of the names of stats.
    pub(super) kind: &'static str,
    /// As `content-encoding` has it.
    pub(super) encoding: HeaderValue,
    pub(super) codecs: Box<C>,
}

/// Makes compressors.
pub(super) trait Compressors: Debug + Send + Sync {
    fn compressor(&self) -> Option<Box<dyn Compress>>;
}

/// Makes decompressors.
pub(super) trait Decompressors: Debug + Send + Sync {
    /// How many times longer what comes out may be than what went in.
    fn max_ratio(&self) -> u64;
    fn decompressor(&self) -> Option<Box<dyn Decompress>>;
}

/// The library has given up.
#[derive(Debug)]
pub(super) struct Failed;

/// Compresses one body.
pub(super) trait Compress {
    /// Appends to `out` all that `input` becomes; with `last` the end of the stream too.
    fn compress(&mut self, input: &[u8], last: bool, out: &mut Vec<u8>) -> Result<(), Failed>;
}

/// How far a decompressor has come.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Step {
    /// There may be more to come out.
    More,
    /// It needs further input, or has seen the end.
    Drained,
    /// What came in is not of this encoding. The name of the counter that says so.
    Broken(&'static str),
}

/// Decompresses one body.
pub(super) trait Decompress {
    /// Takes from the front of `input`, and appends at most a chunk to `out`.
    fn step(&mut self, input: &mut &[u8], out: &mut Vec<u8>) -> Step;
}

/// Reads a `compressor_library`.
pub(super) fn compressors(
    library: Option<&TypedExtensionConfig>,
    path: &str,
) -> Result<Library<dyn Compressors>, FieldError> {
    let (name, config, path) = parts(library, path)?;
    let (kind, encoding, codecs): (_, _, Box<dyn Compressors>) = match type_name(config) {
        "envoy.extensions.compression.gzip.compressor.v3.Gzip" => {
            ("gzip", "gzip", Box::new(gzip::Compressors::parse(config, &path)?))
        }
        "envoy.extensions.compression.brotli.compressor.v3.Brotli" => {
            ("brotli", "br", Box::new(brotli::Compressors::parse(config, &path)?))
        }
        "envoy.extensions.compression.zstd.compressor.v3.Zstd" => {
            ("zstd", "zstd", Box::new(zstd::Compressors::parse(config, &path)?))
        }
        other => return Err(unknown(other, path)),
    };
    Ok(Library { name, kind, encoding: HeaderValue::from_static(encoding), codecs })
}

/// Reads a `decompressor_library`.
pub(super) fn decompressors(
    library: Option<&TypedExtensionConfig>,
    path: &str,
) -> Result<Library<dyn Decompressors>, FieldError> {
    let (name, config, path) = parts(library, path)?;
    let (kind, encoding, codecs): (_, _, Box<dyn Decompressors>) = match type_name(config) {
        "envoy.extensions.compression.gzip.decompressor.v3.Gzip" => {
            ("gzip", "gzip", Box::new(gzip::Decompressors::parse(config, &path)?))
        }
        "envoy.extensions.compression.brotli.decompressor.v3.Brotli" => {
            ("brotli", "br", Box::new(brotli::Decompressors::parse(config, &path)?))
        }
        "envoy.extensions.compression.zstd.decompressor.v3.Zstd" => {
            ("zstd", "zstd", Box::new(zstd::Decompressors::parse(config, &path)?))
        }
        other => return Err(unknown(other, path)),
    };
    Ok(Library { name, kind, encoding: HeaderValue::from_static(encoding), codecs })
}

/// The counters of a decompressor's library, of which the first counts what becomes too long.
pub(super) fn error_names(kind: &str) -> &'static [&'static str] {
    match kind {
        "gzip" => &gzip::ERRORS,
        "brotli" => &brotli::ERRORS,
        _ => &zstd::ERRORS,
    }
}

fn parts<'a>(library: Option<&'a TypedExtensionConfig>, path: &str) -> Result<(String, &'a Any, String), FieldError> {
    let library = library.ok_or_else(|| FieldError::new(path, "value is required"))?;
    let path = format!("{path}.typed_config");
    let config = library.typed_config.as_ref().ok_or_else(|| FieldError::new(&path, "value is required"))?;
    Ok((library.name.clone(), config, path))
}

fn unknown(type_name: &str, path: String) -> FieldError {
    FieldError::new(path, format!("library {type_name} is not supported by culvert yet; it has gzip, brotli and zstd"))
}

fn chunk(size: Option<u32>) -> usize {
    size.map_or(DEFAULT_CHUNK, |size| size as usize)
}

/// Whether a list of tokens has this one, in whatever case.
pub(super) fn has_token(list: &str, token: &str) -> bool {
    list.split(',').any(|word| word.trim().eq_ignore_ascii_case(token))
}

#[cfg(test)]
mod tests;
