//! Which mounted file systems may be frozen: never one that the agent needs in order to go on.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use super::plan::What;
use crate::config::agent::AgentSettings;

/// Whether something is mounted at this path.
fn is_mount_point(path: &Path) -> std::io::Result<bool> {
    let (here, above) = (std::fs::metadata(path)?, std::fs::metadata(path.join(".."))?);
    Ok(here.is_dir() && (here.dev() != above.dev() || here.ino() == above.ino()))
}

/// Refuses a file system that holds the agent's state, disks, program or log. What is not mounted yet is looked at when it is
/// to be frozen.
///
/// # Errors
/// A sentence that names the hook and what is in the way.
pub fn check(settings: &AgentSettings) -> Result<(), String> {
    for hook in &settings.app.hook {
        if let Some(path) = hook.mount.as_ref().filter(|path| is_mount_point(path).unwrap_or_default()) {
            check_mount(path, settings).map_err(|reason| format!("app.hook {}: {reason}", hook.name))?;
        }
    }
    Ok(())
}

/// As [`check`], right before a freeze: it must be mounted now.
pub(super) fn check_now(what: &What, settings: &AgentSettings) -> Result<(), String> {
    let What::Mount { path } = what else { return Ok(()) };
    if !is_mount_point(path).map_err(|e| format!("{}: {e}", path.display()))? {
        // The folder beneath belongs to another file system, perhaps the root's.
        return Err(format!("nothing is mounted at {}", path.display()));
    }
    check_mount(path, settings)
}

fn check_mount(mount: &Path, settings: &AgentSettings) -> Result<(), String> {
    let device = std::fs::metadata(mount).map_err(|e| format!("{}: {e}", mount.display()))?.dev();
    let mut needed: Vec<(&str, PathBuf)> = vec![
        ("the agent's state folder", settings.state.clone()),
        ("the agent's program", "/proc/self/exe".into()),
        ("the agent's log", "/proc/self/fd/2".into()),
    ];
    for disk in &settings.disk {
        needed.extend(disk.kind().files(&disk.path).into_iter().map(|file| ("a disk that the agent serves", file)));
    }
    for (what, path) in needed {
        if std::fs::metadata(&path).is_ok_and(|m| m.dev() == device) {
            return Err(format!(
                "{} holds {what}{}, which would wait for itself while it is frozen: move one of them to another file system",
                mount.display(),
                if path.starts_with("/proc") { String::new() } else { format!(" ({})", path.display()) }
            ));
        }
    }
    Ok(())
}
