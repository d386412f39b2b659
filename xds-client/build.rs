//! Generates two things into `OUT_DIR`:
//! - `envoy.fds`: the descriptor set that the crate `envoy-types` ships, without comments (a third of its size), and with the fields of
//!   Envoy's API that are newer than it (`proto/newer`);
//! - `api.rs` and `culvert.fds`: the Rust types and descriptors of the protos in `proto/`.

use std::error::Error;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::{env, fs};

use prost::Message as _;
use prost::bytes::Buf as _;
use prost::encoding::{self, DecodeContext, WireType};
use prost_types::{DescriptorProto, FileDescriptorProto, FileDescriptorSet};

/// Culvert's own API, and after it what is only needed as descriptors.
const PROTOS: [&str; 5] = [
    "culvert/overrides/v1/overrides.proto",
    "culvert/extensions/filters/http/overrides/v1/override.proto",
    "culvert/extensions/bootstrap/interception/v1/interception.proto",
    "xds/type/v3/typed_struct.proto",
    "udpa/type/v1/typed_struct.proto",
];

/// Fields that are newer than the messages of `envoy-types`, by message.
const NEWER: [&str; 1] = ["health_check.proto"];

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rerun-if-changed=Cargo.toml");
    println!("cargo:rerun-if-changed=proto");
    let manifest_dir = PathBuf::from(env::var("CARGO_MANIFEST_DIR")?);
    let out_dir = PathBuf::from(env::var("OUT_DIR")?);

    let shipped = envoy_types_dir(&manifest_dir)?.join("src/generated/types.bin");
    println!("cargo:rerun-if-changed={}", shipped.display());
    let newer = protox::Compiler::new([manifest_dir.join("proto/newer")])?.open_files(NEWER)?.file_descriptor_set();
    let envoy = add_fields(&strip_source_info(&fs::read(&shipped)?)?, &newer)?;
    fs::write(out_dir.join("envoy.fds"), envoy)?;

    let mut compiler = protox::Compiler::new([manifest_dir.join("proto")])?;
    let mut descriptors = compiler.include_source_info(true).open_files(PROTOS)?.file_descriptor_set();
    fs::write(out_dir.join("culvert.fds"), strip_source_info(&descriptors.encode_to_vec())?)?;
    descriptors.file.retain(|file| file.package().starts_with("culvert."));
    prost_build::Config::new()
        .enable_type_names()
        .type_name_domain(["."], "type.googleapis.com")
        .include_file("api.rs")
        .compile_fds(descriptors)?;
    Ok(())
}

/// Where cargo keeps the sources of `envoy-types`.
fn envoy_types_dir(manifest_dir: &Path) -> Result<PathBuf, Box<dyn Error>> {
    // The network is needed only where dependencies of other targets have not been downloaded yet: try without first.
    let metadata = |offline: bool| {
        let mut command = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
        command.args(["metadata", "--format-version=1", "--filter-platform"]);
        command.arg(env::var("TARGET").unwrap_or_default());
        if offline {
            command.arg("--offline");
        }
        command.current_dir(manifest_dir).output()
    };
    let mut output = metadata(true)?;
    if !output.status.success() {
        output = metadata(false)?;
    }
    if !output.status.success() {
        return Err(format!("cargo metadata failed: {}", String::from_utf8_lossy(&output.stderr)).into());
    }
    let metadata: serde_json::Value = serde_json::from_slice(&output.stdout)?;
    metadata["packages"]
        .as_array()
        .into_iter()
        .flatten()
        .find(|package| package["name"] == "envoy-types")
        .and_then(|package| Path::new(package["manifest_path"].as_str()?).parent())
        .map(Path::to_path_buf)
        .ok_or_else(|| "envoy-types is not in the dependency graph".into())
}

/// Drops `FileDescriptorProto.source_code_info` (field 9) from an encoded `FileDescriptorSet`.
///
/// Works on the wire format: decoding with `prost_types` and encoding again would lose every option that is an
/// extension, and the validation rules are such options.
fn strip_source_info(mut set: &[u8]) -> Result<Vec<u8>, Box<dyn Error>> {
    const FILE: u32 = 1;
    const SOURCE_CODE_INFO: u32 = 9;
    let mut stripped = Vec::with_capacity(set.len());
    while set.has_remaining() {
        let (tag, wire_type) = encoding::decode_key(&mut set)?;
        if (tag, wire_type) != (FILE, WireType::LengthDelimited) {
            return Err(format!("unexpected field {tag} in FileDescriptorSet").into());
        }
        let length = usize::try_from(encoding::decode_varint(&mut set)?)?;
        let (mut file, rest) = set.split_at_checked(length).ok_or("truncated FileDescriptorSet")?;
        set = rest;
        let mut kept = Vec::with_capacity(length);
        while file.has_remaining() {
            let start = file;
            let (tag, wire_type) = encoding::decode_key(&mut file)?;
            encoding::skip_field(wire_type, tag, &mut file, DecodeContext::default())?;
            if tag != SOURCE_CODE_INFO {
                kept.extend_from_slice(&start[..start.len() - file.len()]);
            }
        }
        encoding::encode_key(FILE, WireType::LengthDelimited, &mut stripped);
        encoding::encode_varint(kept.len() as u64, &mut stripped);
        stripped.extend_from_slice(&kept);
    }
    Ok(stripped)
}

/// The number of a field that is a message, and what is in it.
type Part<'a> = (u32, &'a [u8]);

/// The parts of a message that has messages and strings only.
fn parts(mut message: &[u8]) -> Result<Vec<Part<'_>>, Box<dyn Error>> {
    let mut parts = Vec::new();
    while message.has_remaining() {
        let (tag, wire_type) = encoding::decode_key(&mut message)?;
        if wire_type != WireType::LengthDelimited {
            return Err(format!("unexpected type of field {tag}").into());
        }
        let length = usize::try_from(encoding::decode_varint(&mut message)?)?;
        let (part, rest) = message.split_at_checked(length).ok_or("truncated message")?;
        parts.push((tag, part));
        message = rest;
    }
    Ok(parts)
}

fn put(tag: u32, part: &[u8], to: &mut Vec<u8>) {
    encoding::encode_key(tag, WireType::LengthDelimited, to);
    encoding::encode_varint(part.len() as u64, to);
    to.extend_from_slice(part);
}

/// Adds the fields of the messages of `newer` to the messages of the same name in an encoded `FileDescriptorSet`: on the wire, as
/// [`strip_source_info`].
fn add_fields(set: &[u8], newer: &FileDescriptorSet) -> Result<Vec<u8>, Box<dyn Error>> {
    const FILE: u32 = 1;
    const MESSAGE_TYPE: u32 = 4;
    const FIELD: u32 = 2;
    let mut missing: Vec<(&str, &DescriptorProto)> = Vec::new();
    for file in &newer.file {
        missing.extend(file.message_type.iter().map(|message| (file.package(), message)));
    }
    let mut whole = Vec::with_capacity(set.len());
    for (_, file) in parts(set)? {
        let package = FileDescriptorProto::decode(file)?.package().to_owned();
        if missing.iter().all(|(of, _)| *of != package) {
            put(FILE, file, &mut whole);
            continue;
        }
        let mut changed = Vec::with_capacity(file.len());
        for (tag, part) in parts(file)? {
            let known = if tag == MESSAGE_TYPE { Some(DescriptorProto::decode(part)?) } else { None };
            let at = known.as_ref().and_then(|known| {
                missing.iter().position(|(of, message)| *of == package && message.name() == known.name())
            });
            let (Some(known), Some(at)) = (known, at) else {
                put(tag, part, &mut changed);
                continue;
            };
            let mut message = part.to_vec();
            for field in &missing.swap_remove(at).1.field {
                if known.field.iter().any(|it| it.number() == field.number()) {
                    return Err(format!("{}.{} is in envoy-types now", known.name(), field.name()).into());
                }
                put(FIELD, &field.encode_to_vec(), &mut message);
            }
            put(tag, &message, &mut changed);
        }
        put(FILE, &changed, &mut whole);
    }
    match missing.first() {
        Some((package, message)) => Err(format!("envoy-types has no {package}.{}", message.name()).into()),
        None => Ok(whole),
    }
}
