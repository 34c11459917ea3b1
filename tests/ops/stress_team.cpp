// Regions of a Team from several threads at once, of any size, with pauses of any length between them, and in a forked
// child. Prints how many pieces were done; 1 if a piece was done twice or not at all, 2 if the child did not do its work.
#include "team.h"

#include <cstdio>
#include <cstdlib>
#include <random>
#include <sys/wait.h>
#include <thread>
#include <unistd.h>
#include <vector>

using namespace dovetail;

namespace {

std::atomic<long> pieces{0};

void check(const std::vector<std::atomic<int>>& counts, int n, int times) {
    for (int i = 0; i < n; i++)
        if (counts[i] != times) fprintf(stderr, "piece %d of %d: %d times\n", i, n, (int)counts[i]), _exit(1);
    pieces += (long)n * times;
}

void many_regions(unsigned seed, int regions) {
    std::mt19937 random(seed);
    std::vector<Team> teams;
    for (int threads : {1, 2, 3, 5, 8}) teams.emplace_back(threads, 2);
    for (int r = 0; r < regions; r++) {
        Team& team = teams[random() % teams.size()];
        const int n = random() % 40, phases = 1 + random() % 6;
        std::vector<std::atomic<int>> counts(n);
        team.reserve(phases);
        team.run([&](Member& member) {
            for (int p = 0; p < phases; p++)
                member.share(n, [&](int i) {
                    if (counts[i]++ != p) fprintf(stderr, "a phase began before the one before it ended\n"), _exit(1);
                });
        });
        check(counts, n, phases);
        if (random() % 64 == 0) usleep(random() % 3000);
    }
}

}  // namespace

int main(int, char** argv) {
    const int callers = atoi(argv[1]), regions = atoi(argv[2]);
    for (int round = 0; round < 3; round++) {
        std::vector<std::thread> threads;
        for (int i = 0; i < callers; i++) threads.emplace_back(many_regions, 100 * round + i, regions);
        const pid_t child = fork();
        if (child == 0) {
            many_regions(7, 100);
            _exit(0);
        }
        for (auto& t : threads) t.join();
        int status = 0;
        waitpid(child, &status, 0);
        if (status) return 2;
    }
    printf("%ld\n", pieces.load());
}
