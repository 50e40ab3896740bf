//! Rounds of scrubbing, beside everything else. See [`super`].

use std::rc::Rc;
use std::time::Duration;

use tokio::sync::oneshot;

use super::{Outcome, ScrubState, Verifier, rounds};
use crate::clock::{self, Mono};
use crate::control::api::VerifyView;
use crate::master_target::apply::Command as ApplyCommand;
use crate::model::{DiskId, Hold, MachineId, Position};

/// How often one looks whether a round is due.
const LOOK_EVERY: Duration = Duration::from_secs(1);
/// How often it is noted how far a round has come.
const NOTE_EVERY: Duration = Duration::from_secs(30);
/// While batches wait for a replica, a step is taken after so long.
const STEP_ASIDE: Duration = Duration::from_secs(1);
const STEP_ASIDE_LOOKS: u32 = 20;
/// Why a scrub ends in the middle.
const HELD: &str = "the machine fails over";

/// Scrubs until it is ended.
pub(super) async fn run(verifier: Rc<Verifier>) {
    if verifier.rate == 0 || verifier.every.is_zero() {
        return;
    }
    let mut machines: Vec<MachineId> = verifier.shared.disks.iter().map(|d| d.machine).collect();
    machines.dedup();
    loop {
        for machine in &machines {
            if let Err(error) = verifier.round(*machine).await {
                tracing::warn!(%machine, error, "a scrub could not go on; it is tried again");
                tokio::time::sleep(NOTE_EVERY).await;
            }
        }
        tokio::time::sleep(LOOK_EVERY).await;
    }
}

impl Verifier {
    /// Runs the round of a machine to its end if one is due.
    async fn round(&self, machine: MachineId) -> Result<(), String> {
        let mut state = self.records.scrub(machine).map_err(|e| e.to_string())?;
        // Without points there is nothing to look after.
        let held = self.shared.disks.iter().any(|d| d.machine == machine && d.condition().hold != Hold::None);
        if held || !state.is_due(self.shared.clock(), self.every.as_secs()) || self.shared.book().of(machine).is_empty() {
            return Ok(());
        }
        let mut noted = clock::now();
        for (disk, mut after) in state.disks_left(&self.shared.disks_of(machine)) {
            while let Some(start) = self.inspect(disk, after).await? {
                after = Some(start);
                state.at = Some((disk, start));
                if clock::now().since(noted) > NOTE_EVERY {
                    self.note(machine, state.clone()).await?;
                    noted = clock::now();
                }
            }
        }
        let chosen = {
            let book = self.shared.book();
            rounds::choose(&book.of(machine), |id| book.verification(id))
        };
        for id in chosen {
            let Some(point) = self.shared.book().get(id).cloned() else { continue };
            let result = self.verify(&point, async |disk, bytes| self.pace(disk, bytes).await, &mut VerifyView::default()).await;
            match result {
                Ok(Outcome::Good { .. } | Outcome::Bad(_)) => {}
                Err(error) if error == HELD => return Ok(()),
                Err(error) if self.shared.book().get(id).is_some() => {
                    tracing::error!(point = %id, error, "a recovery point could not be verified");
                }
                Err(_) => {}
            }
        }
        self.note(machine, ScrubState { finished: Some(self.shared.clock()), at: None }).await
    }

    async fn note(&self, machine: MachineId, state: ScrubState) -> Result<(), String> {
        let records = self.records.clone();
        let noted = tokio::task::spawn_blocking(move || records.put_scrub(machine, &state)).await;
        noted.map_err(|e| e.to_string())?.map_err(|e| e.to_string())
    }

    async fn inspect(&self, disk: DiskId, after: Option<Position>) -> Result<Option<Position>, String> {
        let (done, answer) = oneshot::channel();
        let gone = || "the master target is stopping".to_owned();
        self.apply.send(ApplyCommand::Inspect { disk, after, rate: self.rate, done }).await.map_err(|_| gone())?;
        answer.await.map_err(|_| gone())?
    }

    /// Waits as the rate wants it, and steps aside for replication.
    async fn pace(&self, disk: DiskId, bytes: u64) -> Result<(), String> {
        let began: Mono = clock::now();
        tokio::time::sleep(Duration::from_secs(bytes) / u32::try_from(self.rate).unwrap_or(u32::MAX)).await;
        for _ in 0..STEP_ASIDE_LOOKS {
            if self.shared.disk(disk).is_none_or(|d| d.waiting() == 0) || clock::now().since(began) > STEP_ASIDE {
                break;
            }
            tokio::time::sleep(STEP_ASIDE / STEP_ASIDE_LOOKS).await;
        }
        // A failover has more to do with the points than a scrub.
        if self.shared.disk(disk).is_some_and(|d| d.condition().hold != Hold::None) { Err(HELD.to_owned()) } else { Ok(()) }
    }
}
