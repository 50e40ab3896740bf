//! Replicating a machine onto disks that have content.

use std::rc::Rc;

use super::engine::Engine;
use crate::model::MachineId;

impl Engine {
    pub(super) async fn reprotect(self: &Rc<Self>, _machine: MachineId, _overwrite: Vec<String>, _by: &str) -> Result<u64, String> {
        Err("not yet".to_owned())
    }
}
