//! Where upstream connections come from, and what is set on their sockets.

use envoy_types::pb::envoy::config::{
    core::v3::{Address, BindConfig, SocketAddress, SocketOption as ProtoOption, address, socket_option},
    upstream::local_address_selector::v3::DefaultLocalAddressSelector,
};
use prost::Name as _;

use super::{
    common::{Result, ip, required, socket_address, type_name},
    support::join,
};
use crate::config::{
    FieldError,
    model::{BindAddress, SocketOption, UpstreamBind},
};

/// A `BindConfig`.
pub(super) fn upstream_bind(config: &BindConfig, path: &str) -> Result<UpstreamBind> {
    let options = socket_options(&config.socket_options, path)?;
    if let Some(config) = config.local_address_selector.as_ref().and_then(|selector| selector.typed_config.as_ref())
        && type_name(config) != DefaultLocalAddressSelector::full_name()
    {
        let path = join(path, "local_address_selector.typed_config");
        return Err(FieldError::unsupported_value(path, type_name(config), &DefaultLocalAddressSelector::full_name()));
    }
    let mut addresses = Vec::new();
    if let Some(source) = &config.source_address {
        addresses.push(bind_address(source, None, &join(path, "source_address"))?);
    }
    if addresses.is_empty() && !config.extra_source_addresses.is_empty() {
        return Err(required(path, "source_address"));
    }
    for (index, extra) in config.extra_source_addresses.iter().enumerate() {
        let path = format!("{}[{index}]", join(path, "extra_source_addresses"));
        let address = extra.address.as_ref().ok_or_else(|| required(&path, "address"))?;
        let own = extra.socket_options.as_ref();
        let own = own.map(|own| socket_options(&own.socket_options, &join(&path, "socket_options"))).transpose()?;
        addresses.push(bind_address(address, own, &join(&path, "address"))?);
    }
    // Which of several would be chosen must not depend on their order.
    let families = addresses.iter().map(|address| address.address.is_ipv6());
    if let [first, _, ..] = families.collect::<Vec<_>>()[..]
        && (addresses.len() > 2 || addresses[1].address.is_ipv6() == first)
    {
        let text = "can only have one extra source address, of the other address family than source_address";
        return Err(FieldError::new(join(path, "extra_source_addresses"), text));
    }
    Ok(UpstreamBind { addresses, freebind: config.freebind.map(|freebind| freebind.value), options })
}

fn bind_address(address: &SocketAddress, options: Option<Vec<SocketOption>>, path: &str) -> Result<BindAddress> {
    // As all addresses are read; the message has it without this frame.
    let framed = Address { address: Some(address::Address::SocketAddress(address.clone())) };
    let unframed = |mut error: FieldError| {
        error.path = error.path.replace(".socket_address", "");
        error
    };
    let (socket, port) = socket_address(&framed, path).map_err(unframed)?;
    Ok(BindAddress { address: (ip(socket, path).map_err(unframed)?, port).into(), options })
}

fn socket_options(options: &[ProtoOption], path: &str) -> Result<Vec<SocketOption>> {
    let parse = |(index, option): (usize, &ProtoOption)| {
        let path = format!("{}[{index}]", join(path, "socket_options"));
        let number = |value: i64, field| {
            i32::try_from(value).map_err(|_| FieldError::new(join(&path, field), format!("{value} does not fit")))
        };
        let value = match &option.value {
            Some(socket_option::Value::IntValue(value)) => number(*value, "int_value")?.to_ne_bytes().into(),
            Some(socket_option::Value::BufValue(bytes)) => bytes.as_slice().into(),
            None => return Err(required(&path, "int_value")),
        };
        let before_bind = option.state == socket_option::SocketState::StatePrebind as i32;
        if option.state == socket_option::SocketState::StateListening as i32 {
            let text = "STATE_LISTENING: upstream sockets do not listen";
            return Err(FieldError::new(join(&path, "state"), text));
        }
        let (level, name) = (number(option.level, "level")?, number(option.name, "name")?);
        Ok(SocketOption { level, name, value, before_bind })
    };
    options.iter().enumerate().map(parse).collect()
}
