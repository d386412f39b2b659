//! gzip, by a zlib in Rust: its C interface is the only one that takes all that Envoy's configuration can ask for.

use std::{ffi::c_int, ptr};

use culvert_xds_client::json::unpack;
use envoy_types::pb::{
    envoy::extensions::compression::gzip::{compressor::v3::Gzip as ProtoCompressor, decompressor::v3::Gzip},
    google::protobuf::Any,
};
use libz_rs_sys::{
    Z_BUF_ERROR, Z_DATA_ERROR, Z_DEFLATED, Z_ERRNO, Z_FINISH, Z_MEM_ERROR, Z_NO_FLUSH, Z_OK, Z_STREAM_END,
    Z_SYNC_FLUSH, Z_VERSION_ERROR, deflate, deflateEnd, deflateInit2_, inflate, inflateEnd, inflateInit2_, z_stream,
    zlibVersion,
};

use super::{Compress, Decompress, Failed, Step, chunk};
use crate::config::FieldError;

/// Added to the window's bits: with the header and the trailer of gzip.
const GZIP: c_int = 16;

/// The counters of a decompressor.
pub(super) const ERRORS: [&str; 6] =
    ["zlib_data_error", "zlib_errno", "zlib_stream_error", "zlib_mem_error", "zlib_buf_error", "zlib_version_error"];

/// What has its defaults from Envoy.
#[derive(Debug)]
pub(super) struct Compressors {
    level: c_int,
    strategy: c_int,
    window_bits: c_int,
    memory_level: c_int,
    chunk: usize,
}

impl Compressors {
    pub(super) fn parse(config: &Any, path: &str) -> Result<Compressors, FieldError> {
        let ProtoCompressor { memory_level, compression_level, compression_strategy, window_bits, chunk_size } =
            unpack(config, path)?;
        let number = |value: Option<u32>, default| value.map_or(default, u32::cast_signed);
        Ok(Compressors {
            // zlib's own default has the number -1.
            level: if compression_level == 0 { -1 } else { compression_level },
            strategy: compression_strategy,
            window_bits: number(window_bits.map(|bits| bits.value), 12),
            memory_level: number(memory_level.map(|level| level.value), 5),
            chunk: chunk(chunk_size.map(|size| size.value)),
        })
    }
}

impl super::Compressors for Compressors {
    fn compressor(&self) -> Option<Box<dyn Compress>> {
        let mut stream = Box::<z_stream>::default();
        let size = size_of::<z_stream>() as c_int;
        // SAFETY: `stream` is a valid z_stream with allocators, and stays where it is: it is boxed.
        let result = unsafe {
            deflateInit2_(
                &raw mut *stream,
                self.level,
                Z_DEFLATED,
                self.window_bits | GZIP,
                self.memory_level,
                self.strategy,
                zlibVersion(),
                size,
            )
        };
        (result == Z_OK).then(|| Box::new(Compressor(Stream { stream, chunk: self.chunk })) as _)
    }
}

/// A stream of either direction.
struct Stream {
    stream: Box<z_stream>,
    chunk: usize,
}

impl Stream {
    /// Calls `run`, which takes from `input` and appends at most a chunk to `out`. Also returns whether the chunk is full.
    fn run(
        &mut self,
        input: &mut &[u8],
        out: &mut Vec<u8>,
        run: unsafe extern "C" fn(*mut z_stream, c_int) -> c_int,
        flush: c_int,
    ) -> (c_int, bool) {
        out.reserve(self.chunk);
        let before = out.len();
        let given = u32::try_from(input.len()).unwrap_or(u32::MAX);
        let room = u32::try_from(self.chunk).unwrap_or(u32::MAX);
        self.stream.next_in = input.as_ptr().cast_mut();
        self.stream.avail_in = given;
        self.stream.next_out = out.spare_capacity_mut().as_mut_ptr().cast();
        self.stream.avail_out = room;
        // SAFETY: the stream was set up with this function's Init; `next_in` has `avail_in` bytes to read, and `next_out`
        // `avail_out` bytes of spare capacity to write.
        let result = unsafe { run(&raw mut *self.stream, flush) };
        let (left, free) = (self.stream.avail_in, self.stream.avail_out);
        (self.stream.next_in, self.stream.next_out) = (ptr::null_mut(), ptr::null_mut());
        *input = &input[(given - left) as usize..];
        // SAFETY: so many bytes of the spare capacity have been written.
        unsafe { out.set_len(before + (room - free) as usize) };
        (result, free == 0)
    }
}

struct Compressor(Stream);

impl Compress for Compressor {
    fn compress(&mut self, mut input: &[u8], last: bool, out: &mut Vec<u8>) -> Result<(), Failed> {
        let flush = if last { Z_FINISH } else { Z_SYNC_FLUSH };
        loop {
            let (result, full) = self.0.run(&mut input, out, deflate, flush);
            match result {
                Z_STREAM_END => return Ok(()),
                Z_OK if full || !input.is_empty() => {}
                // Nothing was left to flush.
                Z_OK | Z_BUF_ERROR if !last && input.is_empty() => return Ok(()),
                Z_OK => {}
                _ => return Err(Failed),
            }
        }
    }
}

impl Drop for Compressor {
    fn drop(&mut self) {
        // SAFETY: it was set up by deflateInit2_ and is not used again.
        unsafe { deflateEnd(&raw mut *self.0.stream) };
    }
}

/// What has its defaults from Envoy.
#[derive(Debug)]
pub(super) struct Decompressors {
    window_bits: c_int,
    chunk: usize,
    max_ratio: u64,
}

impl Decompressors {
    pub(super) fn parse(config: &Any, path: &str) -> Result<Decompressors, FieldError> {
        let Gzip { window_bits, chunk_size, max_inflate_ratio } = unpack(config, path)?;
        Ok(Decompressors {
            window_bits: window_bits.map_or(15, |bits| bits.value.cast_signed()),
            chunk: chunk(chunk_size.map(|size| size.value)),
            max_ratio: max_inflate_ratio.map_or(super::MAX_RATIO, |ratio| u64::from(ratio.value)),
        })
    }
}

impl super::Decompressors for Decompressors {
    fn max_ratio(&self) -> u64 {
        self.max_ratio
    }

    fn decompressor(&self) -> Option<Box<dyn Decompress>> {
        let mut stream = Box::<z_stream>::default();
        let size = size_of::<z_stream>() as c_int;
        // SAFETY: as for the compressor.
        let result = unsafe { inflateInit2_(&raw mut *stream, self.window_bits | GZIP, zlibVersion(), size) };
        (result == Z_OK).then(|| Box::new(Decompressor(Stream { stream, chunk: self.chunk })) as _)
    }
}

struct Decompressor(Stream);

impl Decompress for Decompressor {
    fn step(&mut self, input: &mut &[u8], out: &mut Vec<u8>) -> Step {
        match self.0.run(input, out, inflate, Z_NO_FLUSH) {
            (Z_STREAM_END, _) => Step::Drained,
            (Z_BUF_ERROR, _) if input.is_empty() => Step::Drained,
            (Z_OK, full) if full || !input.is_empty() => Step::More,
            (Z_OK, _) => Step::Drained,
            (error, _) => Step::Broken(match error {
                Z_DATA_ERROR => ERRORS[0],
                Z_ERRNO => ERRORS[1],
                Z_MEM_ERROR => ERRORS[3],
                Z_BUF_ERROR => ERRORS[4],
                Z_VERSION_ERROR => ERRORS[5],
                _ => ERRORS[2],
            }),
        }
    }
}

impl Drop for Decompressor {
    fn drop(&mut self) {
        // SAFETY: it was set up by inflateInit2_ and is not used again.
        unsafe { inflateEnd(&raw mut *self.0.stream) };
    }
}
