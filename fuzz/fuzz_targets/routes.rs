#![no_main]

use culvert_proxy_daemon::{config, http::fuzz};

libfuzzer_sys::fuzz_target!(init: config::fuzz::prepare(), |bytes: &[u8]| fuzz::routes(bytes));
