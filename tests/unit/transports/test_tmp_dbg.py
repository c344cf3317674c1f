import subprocess, sys, os
def test_x():
    for cmd in (["-c","import followups.models"],["-c","import followups"],["-m","followups.transports.sandbox_server","--help"]):
        for core in (None,"pytrace","sysmon"):
            e=dict(os.environ); 
            if core: e["COVERAGE_CORE"]=core
            rs=[subprocess.run([sys.executable,*cmd],capture_output=True,env=e).returncode for _ in range(2)]
            print(cmd,core,rs)
    assert 0
