//! Runs one role until it is told to stop.

use std::path::PathBuf;
use std::sync::Arc;

use anyhow::Context;
use tokio::signal::unix::{SignalKind, signal};

use super::check::load;
use crate::agent::Agent;
use crate::config::{Control, Metrics, agent::AgentSettings, master_target::MasterTargetSettings, process_server::ProcessServerSettings};
use crate::control::server::{self, Role};
use crate::master_target::MasterTarget;
use crate::model::Address;
use crate::observe::http::{self, Readiness};
use crate::observe::{logging, metrics};
use crate::process_server::ProcessServer;

/// Arguments of a server.
#[derive(clap::Args)]
pub(super) struct Args {
    /// Configuration file.
    #[arg(long, value_name = "FILE")]
    config: PathBuf,
    /// Log one JSON object a line.
    #[arg(long)]
    log_json: bool,
}

/// Runs an agent.
pub(super) fn agent(args: &Args) -> anyhow::Result<()> {
    let settings: AgentSettings = load(&args.config)?;
    let (control, scrape) = (settings.control.clone(), settings.metrics.clone());
    run(args, control, scrape, |ready| {
        let agent = Agent::start(settings)?;
        ready.set(true);
        Ok((agent.control(), Box::pin(async move { agent.stop().await }) as Stop))
    })
}

/// Runs a process server.
pub(super) fn process_server(args: &Args) -> anyhow::Result<()> {
    let settings: ProcessServerSettings = load(&args.config)?;
    let (control, scrape) = (settings.control.clone(), settings.metrics.clone());
    run(args, control, scrape, |ready| {
        let server = ProcessServer::start(settings)?;
        *ready = server.readiness.clone();
        Ok((server.control(), Box::pin(async move { server.stop().await }) as Stop))
    })
}

/// Runs a master target.
pub(super) fn master_target(args: &Args) -> anyhow::Result<()> {
    let settings: MasterTargetSettings = load(&args.config)?;
    let (control, scrape) = (settings.control.clone(), settings.metrics.clone());
    run(args, control, scrape, |ready| {
        let target = MasterTarget::start(settings)?;
        *ready = target.readiness.clone();
        Ok((target.control(), Box::pin(async move { target.stop().await }) as Stop))
    })
}

type Stop = std::pin::Pin<Box<dyn Future<Output = ()>>>;

fn run(
    args: &Args,
    control: Control,
    scrape: Metrics,
    start: impl FnOnce(&mut Readiness) -> anyhow::Result<(Arc<dyn Role>, Stop)>,
) -> anyhow::Result<()> {
    logging::init("info", args.log_json);
    logging::abort_on_panic();
    metrics::install();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let Address::Unix(socket) = &control.listen else { anyhow::bail!("[control] listen must be a unix socket") };
        let control_listener = server::bind(socket).await?;
        let scrape_listener = match scrape.listen {
            Some(address) => Some(http::bind(address).await?),
            None => None,
        };
        let mut ready = Readiness::default();
        let (role, stop) = start(&mut ready).with_context(|| format!("cannot start with {}", args.config.display()))?;
        if let Some(listener) = scrape_listener {
            tokio::spawn(http::serve(listener, ready.clone()));
        }
        tokio::spawn(server::serve(control_listener, vec![role]));
        wait_for_signal().await?;
        ready.set(false);
        stop.await;
        let _ = std::fs::remove_file(socket);
        Ok(())
    })
}

async fn wait_for_signal() -> anyhow::Result<()> {
    let (mut terminate, mut interrupt, mut hangup) =
        (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?, signal(SignalKind::hangup())?);
    loop {
        tokio::select! {
            _ = terminate.recv() => return Ok(()),
            _ = interrupt.recv() => return Ok(()),
            _ = hangup.recv() => tracing::warn!("reloading without a restart is not available in this version: restart the server to change its configuration, nothing is lost"),
        }
    }
}
