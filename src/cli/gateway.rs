//! `tidegate gateway`: takes a process server out of service, and back.

use std::time::Duration;

use super::{Ask, ask, output};
use crate::clock;
use crate::config::units::show_size;
use crate::control::api::{DrainView, Request};

/// Nobody was here for so long: nobody comes back. An agent that finds no other process server does so within a second or two.
const QUIET: Duration = Duration::from_secs(3);
const HINT_AFTER: Duration = Duration::from_secs(20);

/// A process server as a gateway among others.
#[derive(clap::Subcommand)]
pub(super) enum GatewayCommand {
    /// Send agents to another process server, and wait until nothing is left here. Stays so until `resume`, also over restarts.
    #[command(after_help = "Example:\n  tidegate gateway drain --control unix:/run/tidegate/process-server.sock")]
    Drain {
        /// Do not wait.
        #[arg(long)]
        no_wait: bool,
        #[command(flatten)]
        ask: Ask,
    },
    /// Take agents again.
    #[command(after_help = "Example:\n  tidegate gateway resume --control unix:/run/tidegate/process-server.sock")]
    Resume(Ask),
    /// How far it is.
    #[command(after_help = "Example:\n  tidegate gateway show --control unix:/run/tidegate/process-server.sock")]
    Show(Ask),
}

/// Runs it.
pub(super) fn run(command: GatewayCommand) -> anyhow::Result<()> {
    match command {
        GatewayCommand::Drain { no_wait, ask: args } => drain(&args, no_wait),
        GatewayCommand::Resume(args) => {
            let view: DrainView = ask(&args.control, &Request::Drain { on: Some(false) })?;
            if args.json {
                return output::json(&view);
            }
            println!("it takes agents again; those that left stay where they are");
            Ok(())
        }
        GatewayCommand::Show(args) => {
            let view: DrainView = ask(&args.control, &Request::Drain { on: None })?;
            if args.json {
                return output::json(&view);
            }
            println!("{}", sentence(&view));
            Ok(())
        }
    }
}

fn drain(args: &Ask, no_wait: bool) -> anyhow::Result<()> {
    let mut view: DrainView = ask(&args.control, &Request::Drain { on: Some(true) })?;
    let (mut told, mut hinted) = (String::new(), false);
    let started = clock::now();
    let mut occupied = started;
    while !no_wait && view.draining {
        let at = clock::now();
        if !is_empty(&view) {
            occupied = at;
        } else if at.since(occupied) >= QUIET {
            break;
        }
        let now = sentence(&view);
        if now != told && !args.json && !is_empty(&view) {
            println!("{now}");
            told = now;
        }
        if !hinted && at.since(started) >= HINT_AFTER && view.agents > 0 && !args.json {
            println!(
                "agents stay that know no other process server which is in service and reaches the master target; it goes on waiting for them (Ctrl-C ends this command only, `gateway resume` takes the server back)"
            );
            hinted = true;
        }
        std::thread::sleep(Duration::from_millis(500));
        view = ask(&args.control, &Request::Drain { on: None })?;
    }
    if args.json {
        return output::json(&view);
    }
    println!("{}", sentence(&view));
    Ok(())
}

fn is_empty(view: &DrainView) -> bool {
    view.agents == 0 && view.waiting_bytes == 0
}

fn sentence(view: &DrainView) -> String {
    match view {
        view if !view.draining => "in service".to_owned(),
        view if is_empty(view) => "drained: no agent is here, nothing waits; it may be stopped".to_owned(),
        view => {
            let agents = if view.agents == 1 { "1 agent is".to_owned() } else { format!("{} agents are", view.agents) };
            format!("draining: {agents} here, {} wait", show_size(view.waiting_bytes))
        }
    }
}
