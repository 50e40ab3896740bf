//! The command line: one file for each group of commands. The only place that uses anyhow.

mod check;
mod failover;
mod gateway;
mod group;
mod group_failover;
mod group_point;
mod machine;
mod output;
mod pki;
mod point;
mod policy;
mod quickstart;
mod recover;
mod servers;
mod status;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{CommandFactory, Parser, Subcommand};

use crate::model::Address;

/// Keeps a second copy of running machines at another site and brings any of them back as it stood at a chosen moment.
#[derive(Parser)]
#[command(name = "tidegate", version, propagate_version = true, max_term_width = 110)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

/// Where a running server answers, and how to print.
#[derive(clap::Args, Clone)]
struct Ask {
    /// Control socket of the server to ask.
    #[arg(long, env = "TIDEGATE_CONTROL", default_value = "unix:/run/tidegate/control.sock", value_name = "unix:PATH")]
    control: Address,
    /// Print JSON instead of a table.
    #[arg(long)]
    json: bool,
}

#[derive(Subcommand)]
enum Command {
    /// Run all roles in one process over loopback, with a CA of its own, on real data.
    #[command(
        after_help = "Examples:\n  tidegate quickstart                       a 1 GiB sample disk, a workload, points, recovery, a report\n  tidegate quickstart --disk /dev/vg/web01  protect that disk until interrupted"
    )]
    Quickstart(quickstart::Args),
    /// Run the agent of a source host.
    #[command(after_help = "Example:\n  tidegate agent --config /etc/tidegate/agent.toml")]
    Agent(servers::Args),
    /// Run a process server (gateway).
    #[command(after_help = "Example:\n  tidegate process-server --config /etc/tidegate/process-server.toml")]
    ProcessServer(servers::Args),
    /// Run a master target.
    #[command(after_help = "Example:\n  tidegate master-target --config /etc/tidegate/master-target.toml")]
    MasterTarget(servers::Args),
    /// Run a coordinator of replication groups.
    #[command(after_help = "Example:\n  tidegate coordinator --config /etc/tidegate/coordinator.toml")]
    Coordinator(servers::Args),
    /// Is it working? Exit code 0 healthy, 1 warning, 2 critical, 3 cannot tell.
    #[command(after_help = "Example:\n  tidegate status --control unix:/run/tidegate/master-target.sock")]
    Status(Ask),
    /// Protected machines.
    #[command(subcommand, after_help = "Example:\n  tidegate machine list")]
    Machine(machine::MachineCommand),
    /// Disks of protected machines.
    #[command(subcommand, after_help = "Example:\n  tidegate disk show web01/sda")]
    Disk(machine::DiskCommand),
    /// A process server among others: take it out of service, and back.
    #[command(subcommand, after_help = "Example:\n  tidegate gateway drain --control unix:/run/tidegate/process-server.sock")]
    Gateway(gateway::GatewayCommand),
    /// Replication groups: machines that recover to one moment. Ask the coordinator.
    #[command(
        subcommand,
        after_help = "Examples:\n  tidegate group create shop --machine db01 --machine web01 --control unix:/run/tidegate/coordinator.sock\n  tidegate group add shop web02\n  tidegate group show shop"
    )]
    Group(group::GroupCommand),
    /// Recovery points.
    #[command(
        subcommand,
        after_help = "Examples:\n  tidegate point list --machine web01\n  tidegate point verify latest\n  tidegate point list --bad\n  tidegate point mark --machine web01 --label before-upgrade --control unix:/run/tidegate/agent.sock"
    )]
    Point(point::PointCommand),
    /// Bring points back.
    #[command(
        subcommand,
        after_help = "Examples:\n  tidegate recover mount latest --nbd unix:/tmp/point.sock\n  tidegate recover export 3f2a --disk sda --format vhdx --output /srv/web01.vhdx"
    )]
    Recover(recover::RecoverCommand),
    /// Fail machines over: try it, do it, undo it, keep it.
    #[command(
        subcommand,
        after_help = "Examples:\n  tidegate failover test web01 --hook kvm --cleanup\n  tidegate failover unplanned web01\n  tidegate failover change-point web01 --point 3f2a\n  tidegate failover commit web01"
    )]
    Failover(failover::FailoverCommand),
    /// Which recovery points stay.
    #[command(
        subcommand,
        after_help = "Examples:\n  tidegate policy show\n  tidegate policy dry-run --ladder \"all for 1h, 1/h to 7d\"\n  tidegate policy set --points-max 500 --yes"
    )]
    Policy(policy::PolicyCommand),
    /// Certificates.
    #[command(
        subcommand,
        after_help = "Example:\n  tidegate pki init /etc/tidegate/ca\n  tidegate pki issue --ca /etc/tidegate/ca --role agent --name web01 --out /etc/tidegate/tls"
    )]
    Pki(pki::PkiCommand),
    /// Check files without changing them.
    #[command(subcommand, after_help = "Example:\n  tidegate check config --role agent /etc/tidegate/agent.toml")]
    Check(check::CheckCommand),
    /// Brings things to rest for an agent, and undoes it whatever becomes of the agent. Started by the agent only.
    #[command(hide = true)]
    AgentGuard,
    /// Print a completion script for a shell.
    #[command(after_help = "Example:\n  tidegate completions bash > /etc/bash_completion.d/tidegate")]
    Completions {
        /// Which shell.
        shell: clap_complete::Shell,
    },
}

/// An error of usage or configuration: exit code 2.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct Usage(String);

/// Parses the command line and runs it. Exit code 0 done, 1 failed, 2 wrong usage or configuration.
pub fn main() -> ExitCode {
    end_quietly_on_a_closed_pipe();
    let cli = Cli::parse();
    let result = match cli.command {
        Command::Quickstart(args) => quickstart::run(args),
        Command::Agent(args) => servers::agent(&args),
        Command::ProcessServer(args) => servers::process_server(&args),
        Command::MasterTarget(args) => servers::master_target(&args),
        Command::Coordinator(args) => servers::coordinator(&args),
        Command::Gateway(command) => gateway::run(command),
        Command::Group(command) => group::run(command),
        Command::Status(ask) => return status::run(&ask),
        Command::Machine(command) => machine::machine(command),
        Command::Disk(command) => machine::disk(command),
        Command::Point(command) => point::run(command),
        Command::Recover(command) => recover::run(command),
        Command::Failover(command) => failover::run(command),
        Command::Policy(command) => policy::run(command),
        Command::Pki(command) => pki::run(command),
        Command::Check(command) => check::run(&command),
        Command::AgentGuard => crate::agent::rest::run_guard().map_err(Into::into),
        Command::Completions { shell } => {
            clap_complete::generate(shell, &mut Cli::command(), "tidegate", &mut std::io::stdout());
            Ok(())
        }
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("tidegate: {}", sentence(&error));
            if error.downcast_ref::<Usage>().is_some() { ExitCode::from(2) } else { ExitCode::FAILURE }
        }
    }
}

/// An error with its causes, without those that the error above repeats.
fn sentence(error: &anyhow::Error) -> String {
    let mut text = String::new();
    for cause in error.chain().map(ToString::to_string) {
        if !text.ends_with(&cause) {
            text = if text.is_empty() { cause } else { format!("{text}: {cause}") };
        }
    }
    text
}

/// Runs a request against a server.
fn ask<T: serde::de::DeserializeOwned>(address: &Address, request: &crate::control::api::Request) -> anyhow::Result<T> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    Ok(runtime.block_on(crate::control::client::call(address, request))?)
}

/// An absolute path, because the server that uses it stands in another folder.
fn absolute(path: &std::path::Path) -> anyhow::Result<PathBuf> {
    Ok(std::path::absolute(path)?)
}

/// `tidegate point list | head` must end without a panic: printing to a pipe that nobody reads any more is no failure.
fn end_quietly_on_a_closed_pipe() {
    let usual = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        let text = info.payload().downcast_ref::<String>().map_or("", String::as_str);
        if text.starts_with("failed printing to stdout") && text.contains("Broken pipe") {
            std::process::exit(0);
        }
        usual(info);
    }));
}
