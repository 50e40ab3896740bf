//! Runs one role until it is told to stop.

use std::path::PathBuf;
use std::sync::Arc;

use anyhow::Context;
use tokio::signal::unix::{SignalKind, signal};

use super::check::load;
use crate::agent::Agent;
use crate::config::agent::AgentSettings;
use crate::config::coordinator::CoordinatorSettings;
use crate::config::master_target::MasterTargetSettings;
use crate::config::process_server::ProcessServerSettings;
use crate::config::{Control, Metrics};
use crate::control::server::{self, Role};
use crate::coordinator::Coordinator;
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

/// A master target keeps hundreds of files of old content open for each disk; the usual soft limit is 1024.
fn open_many_files() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let limit = getrlimit(Resource::Nofile);
    let _ = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, maximum: limit.maximum });
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
    let mut settings: ProcessServerSettings = load(&args.config)?;
    let (control, scrape) = (settings.control.clone(), settings.metrics.clone());
    let beside = settings.coordinator.take();
    run(args, control, scrape, |ready| {
        let coordinator = match beside {
            Some(settings) => {
                let socket = control_socket(&settings.control)?.to_owned();
                let coordinator = Coordinator::start(settings).context("the coordinator beside it does not start")?;
                tokio::spawn(answer(socket.clone(), coordinator.control()));
                Some((coordinator, socket))
            }
            None => None,
        };
        let server = ProcessServer::start(settings)?;
        *ready = server.readiness.clone();
        let role = server.control();
        let stop = async move {
            server.stop().await;
            if let Some((coordinator, socket)) = coordinator {
                coordinator.stop().await;
                let _ = std::fs::remove_file(&socket);
            }
        };
        Ok((role, Box::pin(stop) as Stop))
    })
}

/// Runs a coordinator.
pub(super) fn coordinator(args: &Args) -> anyhow::Result<()> {
    let settings: CoordinatorSettings = load(&args.config)?;
    let (control, scrape) = (settings.control.clone(), settings.metrics.clone());
    run(args, control, scrape, |ready| {
        let coordinator = Coordinator::start(settings)?;
        *ready = coordinator.readiness.clone();
        Ok((coordinator.control(), Box::pin(async move { coordinator.stop().await }) as Stop))
    })
}

/// Answers the command line for a role beside the one that the process is named after.
async fn answer(socket: PathBuf, role: Arc<dyn Role>) {
    match server::bind(&socket).await {
        Ok(listener) => server::serve(listener, vec![role]).await,
        Err(error) => tracing::error!(%error, "the command line cannot reach the coordinator; it runs"),
    }
}

fn control_socket(control: &Control) -> anyhow::Result<&std::path::Path> {
    let Address::Unix(socket) = &control.listen else { anyhow::bail!("[control] listen must be a unix socket") };
    Ok(socket)
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
    crate::panics::abort_on_panic();
    open_many_files();
    metrics::install();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let socket = control_socket(&control)?;
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
