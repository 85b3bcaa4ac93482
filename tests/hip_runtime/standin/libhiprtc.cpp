// A stand-in for hiprtc: each compile runs `$MLAGEN_STANDIN_HIPRTC SOURCE OUTPUT OPTION...`.  What that prints is the log, and what
// it leaves in OUTPUT is the code.  An old one, with $MLAGEN_STANDIN_HIPRTC_OLD, does not know --hiprtc-no-builtin-header.

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <sys/wait.h>
#include <unistd.h>
#include <vector>

namespace {

enum Result { SUCCESS = 0, INVALID_PROGRAM = 4, COMPILATION = 6 };  // hiprtc.h

struct Program { std::string source, name, log, code; };

std::string read_file(const std::string& path)
{
    std::string text;
    if (FILE* file = std::fopen(path.c_str(), "rb")) {
        char buffer[65536];
        for (size_t n; (n = std::fread(buffer, 1, sizeof buffer, file)) > 0;) text.append(buffer, n);
        std::fclose(file);
    }
    return text;
}

Result run(Program& program, std::vector<std::string> words, const std::string& folder)
{
    const std::string log = folder + "/log";
    const pid_t child = fork();
    if (child == 0) {
        std::vector<char*> arguments;
        for (std::string& word : words) arguments.push_back(word.data());
        arguments.push_back(nullptr);
        if (!std::freopen(log.c_str(), "w", stdout) || dup2(1, 2) < 0) _exit(126);
        execv(arguments[0], arguments.data());
        _exit(127);
    }
    int status = 0;
    waitpid(child, &status, 0);
    program.log = read_file(log);
    program.code = read_file(words[2]);
    std::remove(log.c_str());
    return WIFEXITED(status) && WEXITSTATUS(status) == 0 ? SUCCESS : COMPILATION;
}

}  // namespace

extern "C" {

const char* hiprtcGetErrorString(Result result)
{
    return result == COMPILATION ? "HIPRTC_ERROR_COMPILATION" : result == INVALID_PROGRAM ? "HIPRTC_ERROR_INVALID_PROGRAM" : "HIPRTC_SUCCESS";
}

Result hiprtcVersion(int* major, int* minor)
{
    *major = 9;
    *minor = 0;
    return SUCCESS;
}

Result hiprtcCreateProgram(Program** program, const char* source, const char* name, int, const char* const*, const char* const*)
{
    *program = new Program{source, name, "", ""};
    return SUCCESS;
}

Result hiprtcDestroyProgram(Program** program)
{
    if (!program || !*program) return INVALID_PROGRAM;
    delete *program;
    *program = nullptr;
    return SUCCESS;
}

Result hiprtcCompileProgram(Program* program, int count, const char* const* options)
{
    char folder[] = "/tmp/standin-hiprtc-XXXXXX";
    if (!mkdtemp(folder)) return COMPILATION;
    const std::string source = std::string(folder) + "/" + program->name, code = std::string(folder) + "/code";
    std::vector<std::string> words{std::getenv("MLAGEN_STANDIN_HIPRTC"), source, code};
    for (int i = 0; i < count; ++i)
        if (std::getenv("MLAGEN_STANDIN_HIPRTC_OLD") || std::strcmp(options[i], "--hiprtc-no-builtin-header")) words.push_back(options[i]);
    FILE* file = std::fopen(source.c_str(), "wb");
    std::fwrite(program->source.data(), 1, program->source.size(), file);
    std::fclose(file);
    const Result result = run(*program, words, folder);
    std::remove(source.c_str());
    std::remove(code.c_str());
    rmdir(folder);
    return result;
}

Result hiprtcGetProgramLogSize(Program* program, size_t* size)
{
    *size = program->log.size();  // as hiprtc: no zero at the end
    return SUCCESS;
}

Result hiprtcGetProgramLog(Program* program, char* log)
{
    std::memcpy(log, program->log.data(), program->log.size());
    return SUCCESS;
}

Result hiprtcGetCodeSize(Program* program, size_t* size)
{
    *size = program->code.size();
    return SUCCESS;
}

Result hiprtcGetCode(Program* program, char* code)
{
    std::memcpy(code, program->code.data(), program->code.size());
    return SUCCESS;
}

}  // extern "C"
