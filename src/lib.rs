#![deny(unsafe_code)]
pub mod clock; pub mod crypto; pub mod disk; pub mod model; pub mod storage; pub mod wire; pub mod nbd; pub mod config; pub mod observe; pub mod agent; pub mod process_server; pub mod master_target; pub mod control;
