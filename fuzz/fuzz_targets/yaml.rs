#![no_main]

use culvert_proxy_daemon::config::fuzz;

libfuzzer_sys::fuzz_target!(init: fuzz::prepare(), |bytes: &[u8]| fuzz::yaml(bytes));
